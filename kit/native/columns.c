/* kit.memory.columns, which stands in its place where the driver is compiled: stretches of numpy's columns, in C.
 *
 * An assignment to a slice of an array costs numpy a slice, a view and a cast; here it costs a call. A column is an
 * array without gaps; rows of several words are moved as a whole. What is asked for is checked before it is done.
 */
#define PY_SSIZE_T_CLEAN
#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#include <Python.h>
#include <numpy/arrayobject.h>
#include <string.h>

static int there(Py_ssize_t first, Py_ssize_t stop, Py_ssize_t rows)
{
    if (first >= 0 && first <= stop && stop <= rows)
        return 1;
    PyErr_Format(PyExc_IndexError, "rows %zd to %zd of a column of %zd", first, stop, rows);
    return 0;
}

/* Return the array and the bytes of a row, or NULL with an error set: rows [first, stop) must exist. */
static PyArrayObject *column(PyObject *given, Py_ssize_t first, Py_ssize_t stop, int written, Py_ssize_t *row)
{
    if (!PyArray_Check(given)) {
        PyErr_SetString(PyExc_TypeError, "a column is an array");
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)given;
    if (PyArray_NDIM(array) < 1 || !(written ? PyArray_ISCARRAY(array) : PyArray_ISCARRAY_RO(array))) {
        PyErr_SetString(PyExc_ValueError, "a column has no gaps, and may be written where it is");
        return NULL;
    }
    if (!there(first, stop, PyArray_DIM(array, 0)))
        return NULL;
    *row = PyArray_ITEMSIZE(array);
    for (int axis = 1; axis < PyArray_NDIM(array); axis++)
        *row *= PyArray_DIM(array, axis);
    return array;
}

/* Read integers from the arguments; 0 with an error set. */
static int numbers(PyObject *const *args, int count, Py_ssize_t *found)
{
    for (int at = 0; at < count; at++) {
        found[at] = PyLong_AsSsize_t(args[at]);
        if (found[at] == -1 && PyErr_Occurred())
            return 0;
    }
    return 1;
}

static int asked(Py_ssize_t given, Py_ssize_t wanted)
{
    if (given == wanted)
        return 1;
    PyErr_Format(PyExc_TypeError, "%zd arguments are needed, not %zd", wanted, given);
    return 0;
}

static PyObject *unfit(void)
{
    PyErr_SetString(PyExc_TypeError, "a column of integers of 8, 32 or 64 bits is needed");
    return NULL;
}

#define EACH(type, expression)                                   \
    {                                                            \
        type *at = (type *)PyArray_DATA(array) + first;          \
        for (Py_ssize_t i = 0; i < count; i++) { expression; }   \
    }
#define SIZED(expression)                                        \
    switch (row) {                                               \
    case 1: EACH(npy_int8, expression) break;                    \
    case 4: EACH(npy_int32, expression) break;                   \
    case 8: EACH(npy_int64, expression) break;                   \
    default: return unfit();                                     \
    }
#define OPEN                                                     \
    Py_ssize_t n[3], row;                                        \
    if (!asked(nargs, 4) || !numbers(args + 1, 3, n))            \
        return NULL;                                             \
    Py_ssize_t first = n[0], count = n[1] - n[0], value = n[2];  \
    PyArrayObject *array = column(args[0], n[0], n[1], 1, &row); \
    if (array == NULL)                                           \
        return NULL;                                             \
    if (PyArray_ISFLOAT(array))                                  \
        return unfit();

static PyObject *fill(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    OPEN
    SIZED(at[i] = value)
    Py_RETURN_NONE;
}

static PyObject *ramp(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    OPEN
    SIZED(at[i] = value + i)
    Py_RETURN_NONE;
}

static PyObject *ramp_where(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t n[3], row, to, width;
    if (!asked(nargs, 6) || !numbers(args + 1, 3, n) || !numbers(args + 5, 1, &to))
        return NULL;
    Py_ssize_t first = n[0], count = n[1] - n[0], value = n[2];
    PyArrayObject *array = column(args[0], n[0], n[1], 1, &row);
    PyArrayObject *marks = array == NULL ? NULL : column(args[4], to, to + count, 0, &width);
    if (marks == NULL)
        return NULL;
    if (width != 1) {
        PyErr_SetString(PyExc_TypeError, "marks are booleans");
        return NULL;
    }
    npy_bool *mark = (npy_bool *)PyArray_DATA(marks) + to;
    SIZED(if (mark[i]) at[i] = value + i)
    Py_RETURN_NONE;
}

static PyObject *add(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    OPEN
    SIZED(at[i] += value)
    Py_RETURN_NONE;
}

static PyObject *count(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t found = 0;
    OPEN
    SIZED(found += at[i] == value)
    return PyLong_FromSsize_t(found);
}

static PyObject *copy(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t n[2], to, width, row;
    if (!asked(nargs, 5) || !numbers(args + 1, 1, &to) || !numbers(args + 3, 2, n))
        return NULL;
    PyArrayObject *from = column(args[2], n[0], n[1], 0, &row);
    PyArrayObject *into = from == NULL ? NULL : column(args[0], to, to + n[1] - n[0], 1, &width);
    if (into == NULL)
        return NULL;
    if (row != width || PyArray_TYPE(from) != PyArray_TYPE(into)) {
        PyErr_SetString(PyExc_TypeError, "rows of the same type and length are needed");
        return NULL;
    }
    memmove((char *)PyArray_DATA(into) + to * row, (char *)PyArray_DATA(from) + n[0] * row, (n[1] - n[0]) * row);
    Py_RETURN_NONE;
}

static PyObject *marked(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t n[2];
    if (!asked(nargs, 3) || !numbers(args + 1, 2, n))
        return NULL;
    if (!PyByteArray_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "marks are a bytearray");
        return NULL;
    }
    if (!there(n[0], n[1], PyByteArray_GET_SIZE(args[0])))
        return NULL;
    return PyBool_FromLong(memchr(PyByteArray_AS_STRING(args[0]) + n[0], 1, n[1] - n[0]) != NULL);
}

static PyMethodDef methods[] = {
    {"add", (PyCFunction)(void (*)(void))add, METH_FASTCALL, "See kit/memory/columns.py."},
    {"copy", (PyCFunction)(void (*)(void))copy, METH_FASTCALL, "See kit/memory/columns.py."},
    {"count", (PyCFunction)(void (*)(void))count, METH_FASTCALL, "See kit/memory/columns.py."},
    {"fill", (PyCFunction)(void (*)(void))fill, METH_FASTCALL, "See kit/memory/columns.py."},
    {"marked", (PyCFunction)(void (*)(void))marked, METH_FASTCALL, "See kit/memory/columns.py."},
    {"ramp", (PyCFunction)(void (*)(void))ramp, METH_FASTCALL, "See kit/memory/columns.py."},
    {"ramp_where", (PyCFunction)(void (*)(void))ramp_where, METH_FASTCALL, "See kit/memory/columns.py."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "columns", "See kit/memory/columns.py.", -1, methods};

PyMODINIT_FUNC PyInit_columns(void)
{
    import_array();
    PyObject *made = PyModule_Create(&module);
    if (made == NULL)
        return NULL;
    PyObject *names = Py_BuildValue("[sssssss]", "add", "copy", "count", "fill", "marked", "ramp", "ramp_where");
    if (names == NULL || PyModule_AddObject(made, "__all__", names) < 0) {
        Py_XDECREF(names);
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
