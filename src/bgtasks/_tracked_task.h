/* The type of tracked tasks for the compiled registry: asyncio.Task with one more pointer, its record.

   A class statement would do the same, but the interpreter's deallocator for such classes costs 2 to 4 % of a task.
   The methods are those of the Python class in _task.py. */

#ifndef BGTASKS_TRACKED_TASK_H
#define BGTASKS_TRACKED_TASK_H

#include <Python.h>
#include <structmember.h>

static PyTypeObject *bgtasks_task_base = NULL;
static Py_ssize_t bgtasks_record_offset = 0;

/* Set the record of a new task; takes a new reference. */
static void
bgtasks_set_record(PyObject *task, PyObject *record)
{
    Py_INCREF(record);
    *(PyObject **)((char *)task + bgtasks_record_offset) = record;
}

static void
bgtasks_task_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    /* Before the record is released: the finalizer may print the task. The base does not run it a second time. */
    if (PyObject_CallFinalizerFromDealloc(self) < 0) {
        return;
    }
    Py_CLEAR(*(PyObject **)((char *)self + bgtasks_record_offset));
    bgtasks_task_base->tp_dealloc(self);
    if (!(bgtasks_task_base->tp_flags & Py_TPFLAGS_HEAPTYPE)) {
        /* Up to Python 3.11 the base is a static type, whose deallocator does not release the type. */
        Py_DECREF(type);
    }
}

/* Return a new type derived from `base`, which must be asyncio.Task or derive from it. */
static PyObject *
bgtasks_make_task_type(PyObject *base)
{
    /* A record is invisible to the cycle collector, so the base's traverse and clear are inherited as they are. */
    PyMemberDef members[] = {
        {"_record", T_OBJECT_EX, ((PyTypeObject *)base)->tp_basicsize, READONLY, NULL},
        {NULL, 0, 0, 0, NULL},
    };
    PyType_Slot slots[] = {
        {Py_tp_dealloc, bgtasks_task_dealloc},
        {Py_tp_members, members},
        {0, NULL},
    };
    PyType_Spec spec = {
        "bgtasks._registry.Task",
        (int)(((PyTypeObject *)base)->tp_basicsize + sizeof(PyObject *)),
        0,
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
        slots,
    };
    bgtasks_task_base = (PyTypeObject *)base;
    bgtasks_record_offset = ((PyTypeObject *)base)->tp_basicsize;
    Py_INCREF(base);
    return PyType_FromSpecWithBases(&spec, base);
}

#endif
