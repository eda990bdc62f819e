/* Linear layers. On one row (batch 1) a step is bound by reading and writing W:

       forward   y = f(W x + b)                          one pass that reads W
       pull      d = z f'(y),  m = W^T d                 one pass that reads and writes W,
                 W += alpha d x^T,  b += beta d          over the rows with d != 0 alone

   f is the identity or relu. m meets W as it was before the update, row by row. A row with d = 0
   adds zeros to m and to itself, so it is left out; behind a relu that is about half of them.

   The order of every sum is fixed by this code: it depends neither on where memory lies nor on how
   wide the machine's vectors are, and nothing is fused (-ffp-contract=off, scripts/build_native.py),
   so that all clones, and processors of all kinds, have the same bits. Pointers come as integers (Tensor.data_ptr()); shapes and types
   are the caller's business (rows.py).

   A chain steps several layers in one call, each of which reads the one before. On several rows the
   products are those of a BLAS, whose function the caller gives; its bits are its own.

   W: (O, I), x, m: (I,), y, z, d: (O,), b: (O,) or NULL. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

/* A layer of a chain. */
typedef struct {
    size_t w, b, out, in, relu;
} Layer;

/* So many numbers, filled up to a multiple of 64 bytes of either type. */
#define FILLED(n) (((n) + 15) / 16 * 16)

#define REAL float
#define NAME(x) x##_f32
#include "rows.h"
#undef REAL
#undef NAME

#define REAL double
#define NAME(x) x##_f64
#include "rows.h"
#undef REAL
#undef NAME

enum { DOUBLE = 1 };

/* Reads the arguments of one call: `n` integers (pointers, sizes, flags), then `m` numbers. */
static int arguments(PyObject *const *args, Py_ssize_t given, size_t *whole, int n, double *real,
                     int m)
{
    if (given != n + m) {
        PyErr_Format(PyExc_TypeError, "%d arguments wanted, %zd given", n + m, given);
        return 0;
    }
    for (int i = 0; i < n; i++) {
        whole[i] = PyLong_AsSize_t(args[i]);
        if (whole[i] == (size_t)-1 && PyErr_Occurred())
            return 0;
    }
    for (int i = 0; i < m; i++) {
        real[i] = PyFloat_AsDouble(args[n + i]);
        if (real[i] == -1.0 && PyErr_Occurred())
            return 0;
    }
    return 1;
}

/* Of several rows, whose products take their time, other threads run meanwhile. */
static PyThreadState *let_others_run(size_t rows)
{
    return rows == 1 ? NULL : PyEval_SaveThread();
}

static void go_on(PyThreadState *others)
{
    if (others != NULL)
        PyEval_RestoreThread(others);
}

static PyObject *py_chain_forward(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[8];
    (void)self;
    if (!arguments(args, given, a, 8, NULL, 0))
        return NULL;
    PyThreadState *others = let_others_run(a[5]);
    if (a[7] & DOUBLE)
        chain_forward_f64((void *)a[0], a[1], (void *)a[2], (void *)a[3], (void *)a[4], a[5],
                          (Gemm_f64 *)a[6]);
    else
        chain_forward_f32((void *)a[0], a[1], (void *)a[2], (void *)a[3], (void *)a[4], a[5],
                          (Gemm_f32 *)a[6]);
    go_on(others);
    Py_RETURN_NONE;
}

static PyObject *py_chain_pull(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[13], most = 0, *active = NULL;
    double limit;
    unsigned long long moved;
    (void)self;
    if (!arguments(args, given, a, 13, &limit, 1))
        return NULL;
    const Layer *layer = (void *)a[0];
    for (size_t l = 0; a[10] == 1 && l < a[1]; l++)
        if (layer[l].out > most)
            most = layer[l].out;
    if (a[10] == 1 && (active = malloc(most * sizeof(size_t))) == NULL)
        return PyErr_NoMemory();
    PyThreadState *others = let_others_run(a[10]);
    if (a[12] & DOUBLE)
        moved = chain_pull_f64(layer, a[1], (void *)a[2], (void *)a[3], (void *)a[4], (void *)a[5],
                               (void *)a[6], (void *)a[7], (void *)a[8], (void *)a[9], a[10],
                               (Gemm_f64 *)a[11], active, limit);
    else
        moved = chain_pull_f32(layer, a[1], (void *)a[2], (void *)a[3], (void *)a[4], (void *)a[5],
                               (void *)a[6], (void *)a[7], (void *)a[8], (void *)a[9], a[10],
                               (Gemm_f32 *)a[11], active, limit);
    go_on(others);
    free(active);
    return PyLong_FromUnsignedLongLong(moved);
}

static PyObject *py_masked(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[5];
    (void)self;
    if (!arguments(args, given, a, 5, NULL, 0))
        return NULL;
    double squares = a[4] & DOUBLE
                         ? masked_f64((void *)a[0], (void *)a[1], (void *)a[2], a[3])
                         : masked_f32((void *)a[0], (void *)a[1], (void *)a[2], a[3]);
    return PyFloat_FromDouble(sqrt(squares));
}

static PyObject *py_columns(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[5];
    double beta;
    (void)self;
    if (!arguments(args, given, a, 5, &beta, 1))
        return NULL;
    if (a[4] & DOUBLE)
        columns_f64((void *)a[0], (void *)a[1], a[2], a[3], beta);
    else
        columns_f32((void *)a[0], (void *)a[1], a[2], a[3], (float)beta);
    Py_RETURN_NONE;
}

static PyObject *py_cross_entropy(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[8];
    (void)self;
    if (!arguments(args, given, a, 8, NULL, 0))
        return NULL;
    int64_t ignored = -(int64_t)a[6];
    int known = a[7] & DOUBLE ? cross_entropy_f64((void *)a[0], (void *)a[1], (void *)a[2],
                                                  (void *)a[3], a[4], a[5], ignored)
                              : cross_entropy_f32((void *)a[0], (void *)a[1], (void *)a[2],
                                                  (void *)a[3], a[4], a[5], ignored);
    return PyBool_FromLong(known);
}

static PyObject *py_norm(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[3];
    (void)self;
    if (!arguments(args, given, a, 3, NULL, 0))
        return NULL;
    double squares =
        a[2] & DOUBLE ? squares_f64((void *)a[0], a[1]) : squares_f32((void *)a[0], a[1]);
    return PyFloat_FromDouble(sqrt(squares));
}

static PyMethodDef METHODS[] = {
    {"chain_forward", (PyCFunction)(void (*)(void))py_chain_forward, METH_FASTCALL,
     "chain_forward(layers, n, x, inner, y, rows, gemm, flags): y; the outputs of the others go to\n"
     "`inner`. gemm: the address of a BLAS's function for several rows, 0 for one."},
    {"chain_pull", (PyCFunction)(void (*)(void))py_chain_pull, METH_FASTCALL,
     "chain_pull(layers, n, x, inner, y, z, d, m, to, rates, rows, gemm, flags, limit) -> bit l:\n"
     "layer l has moved. m: room for the widest message; to: the first layer's, 0 where it is not wanted;\n"
     "rates: alpha and beta of every layer, or 0. Where |d| sqrt(|x|^2 [alpha != 0] + R [beta != 0])\n"
     "is above the limit, or NaN, W and b of a layer stay as they are."},
    {"masked", (PyCFunction)(void (*)(void))py_masked, METH_FASTCALL,
     "masked(z, y, d, n, flags) -> |d|, where d is z, and 0 where y <= 0."},
    {"columns", (PyCFunction)(void (*)(void))py_columns, METH_FASTCALL,
     "columns(b, d, rows, n, flags, beta): b += beta times the sum of d's rows."},
    {"cross_entropy", (PyCFunction)(void (*)(void))py_cross_entropy, METH_FASTCALL,
     "cross_entropy(y, classes, loss, d, rows, n, -ignored, flags) -> whether all classes are\n"
     "known: the mean loss, and its slope d."},
    {"norm", (PyCFunction)(void (*)(void))py_norm, METH_FASTCALL,
     "norm(x, n, flags) -> the Euclidean norm."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_rows", "Linear layers; see rows.py.", -1, METHODS,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__rows(void)
{
    return PyModule_Create(&MODULE);
}
