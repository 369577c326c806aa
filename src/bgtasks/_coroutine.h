/* What Cython does not offer a class that asyncio is to step like a coroutine. */

#ifndef BGTASKS_COROUTINE_H
#define BGTASKS_COROUTINE_H

#include <Python.h>

/* Have PyIter_Send, by which asyncio steps a task, call `send` for instances of `type`, which must define __await__:
   the slot table that Cython makes for that method has an empty place for this one. */
static void
bgtasks_set_am_send(PyObject *type, sendfunc send)
{
    ((PyTypeObject *)type)->tp_as_async->am_send = send;
}

/* Take the raised exception out of the thread's error indicator; a new reference. */
static PyObject *
bgtasks_take_error(void)
{
#if PY_VERSION_HEX >= 0x030C0000
    return PyErr_GetRaisedException();
#else
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback != NULL) {
        PyException_SetTraceback(value, traceback);
        Py_DECREF(traceback);
    }
    Py_DECREF(type);
    return value;
#endif
}

/* Raise `error` as it is; the reference stays the caller's. */
static void
bgtasks_put_error(PyObject *error)
{
    Py_INCREF(error);
#if PY_VERSION_HEX >= 0x030C0000
    PyErr_SetRaisedException(error);
#else
    Py_INCREF(Py_TYPE(error));
    PyErr_Restore((PyObject *)Py_TYPE(error), error, PyException_GetTraceback(error));
#endif
}

#endif
