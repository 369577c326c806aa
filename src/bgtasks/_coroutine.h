/* The parts of a coroutine that Cython does not offer for a class, for classes that asyncio steps. */

#ifndef BGTASKS_COROUTINE_H
#define BGTASKS_COROUTINE_H

#include <Python.h>

/* Have PyIter_Send, with which asyncio steps a task, call `send` for instances of `type`. The type must define
   __await__: the slot table that Cython makes for that method has am_send empty. */
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

/* Raise `error` as it is; the caller keeps its reference. */
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
