/* Weak references, read without a call: the name of the function that does so changed with Python 3.13. */

#ifndef BGTASKS_WEAK_H
#define BGTASKS_WEAK_H

#include <Python.h>

/* Return what `reference` refers to, None if that is gone; a new reference. */
static inline PyObject *
bgtasks_referent(PyObject *reference)
{
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *value;
    int status = PyWeakref_GetRef(reference, &value);
    return status < 0 ? NULL : status == 0 ? Py_NewRef(Py_None) : value;
#else
    PyObject *value = PyWeakref_GetObject(reference);
    return value == NULL ? NULL : Py_NewRef(value);
#endif
}

/* Return whether `reference` refers to `value`, which is alive. */
static inline int
bgtasks_refers_to(PyObject *reference, PyObject *value)
{
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *found;
    if (PyWeakref_GetRef(reference, &found) <= 0) {
        return 0;
    }
    Py_DECREF(found);
    return found == value;
#else
    return PyWeakref_GET_OBJECT(reference) == value;
#endif
}

#endif
