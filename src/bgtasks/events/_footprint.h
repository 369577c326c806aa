/* The memory of an event, by a walk over its parts that runs no Python code. */

#ifndef BGTASKS_FOOTPRINT_H
#define BGTASKS_FOOTPRINT_H

#include <Python.h>
#if PY_VERSION_HEX < 0x030C0000
#include <structmember.h>
#endif

/* A part with as many references is shared with the program: a constant, a setting. */
#define BGTASKS_SHARED 4
/* The walk gives up at more parts than these, and does not go deeper than this. */
#define BGTASKS_MOST_PARTS 4096
#define BGTASKS_DEEPEST 16
/* The keys of a dictionary with more of them are counted, too. */
#define BGTASKS_FEW_KEYS 16

typedef struct {
    Py_ssize_t bytes;
    Py_ssize_t parts_left;
    int depth_left;
    PyObject *layouts;
    PyObject *unknown;
} bgtasks_walk;

static int bgtasks_add(PyObject *whole, bgtasks_walk *walk);

static inline int
bgtasks_add_part(PyObject *part, void *walk)
{
    if (Py_REFCNT(part) >= BGTASKS_SHARED) {
        return 0;
    }
    if (--((bgtasks_walk *)walk)->parts_left < 0) {
        return -1;
    }
    return bgtasks_add(part, (bgtasks_walk *)walk);
}

static inline Py_ssize_t
bgtasks_int_size(PyObject *number)
{
#if PY_VERSION_HEX >= 0x030C0000
    return 32 + 4 * (Py_ssize_t)(((PyLongObject *)number)->long_value.lv_tag >> 3);
#else
    return 32 + 4 * Py_ABS(Py_SIZE(number));
#endif
}

/* Add an object that is no leaf, with its parts. */
static int
bgtasks_add_parts(PyObject *whole, bgtasks_walk *walk)
{
    PyTypeObject *kind = Py_TYPE(whole);
    PyObject *layout;
    if (walk->depth_left == 0) {
        return 0;
    }
    if (PyDict_CheckExact(whole)) {
        PyObject *key, *value;
        Py_ssize_t position = 0, count = PyDict_GET_SIZE(whole);
        walk->bytes += 64 + (count > 5 ? 36 * count : 120);
        if (count <= BGTASKS_FEW_KEYS) {
            /* Faster, but not the keys: the few of an event are names. */
            return kind->tp_traverse(whole, bgtasks_add_part, walk);
        }
        while (PyDict_Next(whole, &position, &key, &value)) {
            if (bgtasks_add_part(value, walk) || bgtasks_add_part(key, walk)) {
                return -1;
            }
        }
        return 0;
    }
    if (PyList_CheckExact(whole)) {
        walk->bytes += 56 + 8 * ((PyListObject *)whole)->allocated;
        for (Py_ssize_t index = 0; index < PyList_GET_SIZE(whole); index++) {
            if (bgtasks_add_part(PyList_GET_ITEM(whole, index), walk)) {
                return -1;
            }
        }
        return 0;
    }
    if (PyTuple_CheckExact(whole)) {
        walk->bytes += 56 + 8 * PyTuple_GET_SIZE(whole);
        return kind->tp_traverse(whole, bgtasks_add_part, walk);
    }
    if (PyAnySet_CheckExact(whole)) {
        walk->bytes += 200 + 16 * (((PySetObject *)whole)->mask + 1);
        return kind->tp_traverse(whole, bgtasks_add_part, walk);
    }
    /* A metaclass with a hash of its own could run Python code. */
    layout = Py_TYPE(kind)->tp_hash == PyType_Type.tp_hash ? PyDict_GetItemWithError(walk->layouts, (PyObject *)kind)
                                                           : NULL;
    if (layout == NULL || layout == Py_None) {
        walk->unknown = (PyObject *)kind;
        return -1;
    }
    walk->bytes += kind->tp_basicsize + (kind->tp_dictoffset != 0 ? 120 : 16);
    if (layout == Py_True) {
        return kind->tp_traverse == NULL ? 0 : kind->tp_traverse(whole, bgtasks_add_part, walk);
    }
    /* The places of its fields. */
    for (Py_ssize_t index = 0; index < PyBytes_GET_SIZE(layout) / (Py_ssize_t)sizeof(Py_ssize_t); index++) {
        Py_ssize_t offset = ((Py_ssize_t *)PyBytes_AS_STRING(layout))[index];
        PyObject *part = *(PyObject **)((char *)whole + offset);
        if (part != NULL && bgtasks_add_part(part, walk)) {
            return -1;
        }
    }
    return 0;
}

static int
bgtasks_add(PyObject *whole, bgtasks_walk *walk)
{
    int status;
    if (PyUnicode_CheckExact(whole)) {
        walk->bytes += 56 + PyUnicode_GET_LENGTH(whole) * PyUnicode_KIND(whole);
        return 0;
    }
    if (PyFloat_CheckExact(whole)) {
        walk->bytes += 24;
        return 0;
    }
    if (PyLong_CheckExact(whole)) {
        walk->bytes += bgtasks_int_size(whole);
        return 0;
    }
    if (PyBytes_CheckExact(whole)) {
        walk->bytes += 40 + PyBytes_GET_SIZE(whole);
        return 0;
    }
    if (PyByteArray_CheckExact(whole)) {
        walk->bytes += 56 + ((PyByteArrayObject *)whole)->ob_alloc;
        return 0;
    }
    if (whole == Py_None || PyBool_Check(whole) || PyType_Check(whole)) {
        return 0;
    }
    walk->depth_left--;
    status = bgtasks_add_parts(whole, walk);
    walk->depth_left++;
    return status;
}

/* Return about how many bytes of memory `event` takes; -1 if it has too many parts, or one whose layout is not in
   `layouts`; then `*unknown` is its type, borrowed, or else NULL. */
static inline Py_ssize_t
bgtasks_footprint(PyObject *event, PyObject *layouts, PyObject **unknown)
{
    bgtasks_walk walk = {0, BGTASKS_MOST_PARTS, BGTASKS_DEEPEST, layouts, NULL};
    int status = bgtasks_add(event, &walk);
    *unknown = walk.unknown;
    return status ? -1 : walk.bytes;
}

/* Return the place of a field in the objects of a class, given the member of the class; -1 if it has none. */
static inline Py_ssize_t
bgtasks_offset(PyObject *member)
{
    return Py_IS_TYPE(member, &PyMemberDescr_Type) ? ((PyMemberDescrObject *)member)->d_member->offset : -1;
}

#endif
