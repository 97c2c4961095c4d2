/* kit.memory.columns, which stands in its place where the driver is compiled: rows of numpy's columns, in C.
 *
 * An assignment to a slice of an array costs numpy a slice, a view and a cast; here all runs of a mask cost one call. A
 * column is an array without gaps; rows of several words are moved as a whole. What is asked for is checked before it
 * is done.
 */
#define PY_SSIZE_T_CLEAN
#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#include <Python.h>
#include <numpy/arrayobject.h>
#include <string.h>

/* The pages that are meant: runs of them, (first page, pages) each, in a list or a tuple. */
typedef struct {
    PyObject **pairs;
    Py_ssize_t count;
} Runs;

static PyObject *unfit(const char *needed)
{
    PyErr_SetString(PyExc_TypeError, needed);
    return NULL;
}

static int asked(Py_ssize_t given, Py_ssize_t wanted)
{
    if (given == wanted)
        return 1;
    PyErr_Format(PyExc_TypeError, "%zd arguments are needed, not %zd", wanted, given);
    return 0;
}

static int number(PyObject *given, Py_ssize_t *found)
{
    *found = PyLong_AsSsize_t(given);
    return *found != -1 || !PyErr_Occurred();
}

static int runs_of(PyObject *given, Runs *runs)
{
    if (!PyList_Check(given) && !PyTuple_Check(given)) {
        unfit("runs are a list or a tuple");
        return 0;
    }
    runs->pairs = PySequence_Fast_ITEMS(given);
    runs->count = PySequence_Fast_GET_SIZE(given);
    return 1;
}

static int run(const Runs *runs, Py_ssize_t which, Py_ssize_t *first, Py_ssize_t *pages)
{
    PyObject *pair = runs->pairs[which];
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2) {
        unfit("a run is (first page, pages)");
        return 0;
    }
    return number(PyTuple_GET_ITEM(pair, 0), first) && number(PyTuple_GET_ITEM(pair, 1), pages);
}

/* Whether the rows of all runs exist, with an error set where they do not. */
static int there(const Runs *runs, Py_ssize_t at, Py_ssize_t rows)
{
    for (Py_ssize_t i = 0; i < runs->count; i++) {
        Py_ssize_t first, pages;
        if (!run(runs, i, &first, &pages))
            return 0;
        size_t row = (size_t)at + (size_t)first; /* below 0 it is a large number */
        if (row > (size_t)rows || pages < 0 || (size_t)pages > (size_t)rows - row) {
            PyErr_Format(PyExc_IndexError, "rows %zd to %zd of a column of %zd", row, row + pages, rows);
            return 0;
        }
    }
    return 1;
}

/* Return the array and the bytes of a row, or NULL with an error set: the rows of all runs must exist. */
static PyArrayObject *column(PyObject *given, const Runs *runs, Py_ssize_t at, int written, Py_ssize_t *row)
{
    if (!PyArray_Check(given)) {
        unfit("a column is an array");
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)given;
    if (PyArray_NDIM(array) < 1 || !(written ? PyArray_ISCARRAY(array) : PyArray_ISCARRAY_RO(array))) {
        PyErr_SetString(PyExc_ValueError, "a column has no gaps, and may be written where it is");
        return NULL;
    }
    if (!there(runs, at, PyArray_DIM(array, 0)))
        return NULL;
    *row = PyArray_ITEMSIZE(array);
    for (int axis = 1; axis < PyArray_NDIM(array); axis++)
        *row *= PyArray_DIM(array, axis);
    return array;
}

/* For each row `cell[i]` of each run: its page is `page + i`. */
#define EACH(type, expression)                                                    \
    for (Py_ssize_t r = 0, page, pages; r < runs.count; r++) {                    \
        run(&runs, r, &page, &pages);                                             \
        type *cell = (type *)PyArray_DATA(array) + at + page;                     \
        for (Py_ssize_t i = 0; i < pages; i++) { expression; }                    \
    }
#define SIZED(expression)                                                         \
    switch (row) {                                                                \
    case 1: EACH(npy_int8, expression) break;                                     \
    case 4: EACH(npy_int32, expression) break;                                    \
    case 8: EACH(npy_int64, expression) break;                                    \
    default: return unfit("a column of integers of 8, 32 or 64 bits is needed");  \
    }
#define OPEN(arguments)                                                           \
    Runs runs;                                                                    \
    Py_ssize_t at, value, row;                                                    \
    if (!asked(nargs, arguments) || !number(args[1], &at) || !runs_of(args[2], &runs) || !number(args[3], &value)) \
        return NULL;                                                              \
    PyArrayObject *array = column(args[0], &runs, at, 1, &row);                   \
    if (array == NULL)                                                            \
        return NULL;                                                              \
    if (PyArray_ISFLOAT(array))                                                   \
        return unfit("a column of integers of 8, 32 or 64 bits is needed");

static PyObject *add(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    OPEN(4)
    SIZED(cell[i] += value)
    Py_RETURN_NONE;
}

static PyObject *count(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t found = 0;
    OPEN(4)
    SIZED(found += cell[i] == value)
    return PyLong_FromSsize_t(found);
}

static PyObject *fill(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    OPEN(4)
    SIZED(cell[i] = value)
    Py_RETURN_NONE;
}

static PyObject *ramp(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    OPEN(4)
    SIZED(cell[i] = value + page + i)
    Py_RETURN_NONE;
}

static PyObject *ramp_where(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t marks_at, width;
    OPEN(6)
    PyArrayObject *marks = number(args[5], &marks_at) ? column(args[4], &runs, marks_at, 0, &width) : NULL;
    if (marks == NULL)
        return NULL;
    if (width != 1)
        return unfit("marks are booleans");
    npy_bool *mark = (npy_bool *)PyArray_DATA(marks) + marks_at;
    SIZED(if (mark[page + i]) cell[i] = value + page + i)
    Py_RETURN_NONE;
}

static PyObject *copy(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Runs runs;
    Py_ssize_t to, at, width, row;
    if (!asked(nargs, 5) || !number(args[1], &to) || !number(args[3], &at) || !runs_of(args[4], &runs))
        return NULL;
    PyArrayObject *from = column(args[2], &runs, at, 0, &row);
    PyArrayObject *into = from == NULL ? NULL : column(args[0], &runs, to, 1, &width);
    if (into == NULL)
        return NULL;
    if (row != width || PyArray_TYPE(from) != PyArray_TYPE(into))
        return unfit("rows of the same type and length are needed");
    char *target = (char *)PyArray_DATA(into) + to * row, *source = (char *)PyArray_DATA(from) + at * row;
    for (Py_ssize_t r = 0, page, pages; r < runs.count; r++) {
        run(&runs, r, &page, &pages);
        memmove(target + page * row, source + page * row, pages * row);
    }
    Py_RETURN_NONE;
}

static PyObject *marked(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Runs runs;
    Py_ssize_t at;
    if (!asked(nargs, 3) || !number(args[1], &at) || !runs_of(args[2], &runs))
        return NULL;
    if (!PyByteArray_Check(args[0]))
        return unfit("marks are a bytearray");
    if (!there(&runs, at, PyByteArray_GET_SIZE(args[0])))
        return NULL;
    char *mark = PyByteArray_AS_STRING(args[0]) + at;
    for (Py_ssize_t r = 0, page, pages; r < runs.count; r++) {
        run(&runs, r, &page, &pages);
        if (memchr(mark + page, 1, pages) != NULL)
            Py_RETURN_TRUE;
    }
    Py_RETURN_FALSE;
}
/* Numbers of rows: 32 bits each, or 64. */
typedef struct {
    const void *data;
    Py_ssize_t count;
    int wide;
} Rows;

static int rows_of(PyObject *given, Rows *rows)
{
    PyArrayObject *array = (PyArrayObject *)given;
    if (PyArray_Check(given) && PyArray_NDIM(array) == 1 && PyArray_ISCARRAY_RO(array)
        && (PyArray_TYPE(array) == NPY_INT64 || PyArray_TYPE(array) == NPY_INT32)) {
        rows->data = PyArray_DATA(array);
        rows->count = PyArray_DIM(array, 0);
        rows->wide = PyArray_TYPE(array) == NPY_INT64;
        return 1;
    }
    unfit("numbers of rows are an array of int32 or int64 without gaps");
    return 0;
}

/* For each number `row[i]`, of either width. */
#define NUMBERED(statement)                                                       \
    if (rows.wide) {                                                              \
        const npy_int64 *row = (const npy_int64 *)rows.data;                      \
        for (Py_ssize_t i = 0; i < rows.count; i++) statement                     \
    } else {                                                                      \
        const npy_int32 *row = (const npy_int32 *)rows.data;                      \
        for (Py_ssize_t i = 0; i < rows.count; i++) statement                     \
    }

/* Return the bytes of a column, or NULL with an error set. */
static const npy_uint8 *bytes_of(PyObject *given, Py_ssize_t *count)
{
    PyArrayObject *array = (PyArrayObject *)given;
    if (PyArray_Check(given) && PyArray_ITEMSIZE(array) == 1 && PyArray_NDIM(array) == 1 && PyArray_ISCARRAY_RO(array)) {
        *count = PyArray_DIM(array, 0);
        return (const npy_uint8 *)PyArray_DATA(array);
    }
    unfit("a column of bytes without gaps is needed");
    return NULL;
}

static PyObject *missing(npy_int64 row, Py_ssize_t rows)
{
    return PyErr_Format(PyExc_IndexError, "row %zd of a column of %zd", (Py_ssize_t)row, rows);
}

static PyObject *count_below(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t height, limited, found = 0;
    Rows rows;
    if (!asked(nargs, 3))
        return NULL;
    const npy_uint8 *cell = bytes_of(args[0], &height);
    const npy_uint8 *limit = cell != NULL && rows_of(args[1], &rows) ? bytes_of(args[2], &limited) : NULL;
    if (limit == NULL)
        return NULL;
    if (limited != rows.count)
        return unfit("a limit for each row is needed");
    NUMBERED({
        npy_int64 at = row[i] < 0 ? row[i] + height : row[i];
        if ((npy_uint64)at >= (npy_uint64)height)
            return missing(row[i], height);
        found += cell[at] < limit[i];
    })
    return PyLong_FromSsize_t(found);
}

static PyObject *mark(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Rows rows;
    if (!asked(nargs, 2))
        return NULL;
    if (!PyByteArray_Check(args[0]))
        return unfit("marks are a bytearray");
    if (!rows_of(args[1], &rows))
        return NULL;
    Py_ssize_t height = PyByteArray_GET_SIZE(args[0]);
    char *cell = PyByteArray_AS_STRING(args[0]);
    NUMBERED(
        if (row[i] < -height || row[i] >= height)
            return missing(row[i], height);
    )
    NUMBERED(cell[row[i] < 0 ? row[i] + height : row[i]] = 1;)
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"add", (PyCFunction)(void (*)(void))add, METH_FASTCALL, "See kit/memory/columns.py."},
    {"copy", (PyCFunction)(void (*)(void))copy, METH_FASTCALL, "See kit/memory/columns.py."},
    {"count", (PyCFunction)(void (*)(void))count, METH_FASTCALL, "See kit/memory/columns.py."},
    {"count_below", (PyCFunction)(void (*)(void))count_below, METH_FASTCALL, "See kit/memory/columns.py."},
    {"fill", (PyCFunction)(void (*)(void))fill, METH_FASTCALL, "See kit/memory/columns.py."},
    {"mark", (PyCFunction)(void (*)(void))mark, METH_FASTCALL, "See kit/memory/columns.py."},
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
    PyObject *names = Py_BuildValue(
        "[sssssssss]", "add", "copy", "count", "count_below", "fill", "mark", "marked", "ramp", "ramp_where");
    if (names == NULL || PyModule_AddObject(made, "__all__", names) < 0) {
        Py_XDECREF(names);
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
