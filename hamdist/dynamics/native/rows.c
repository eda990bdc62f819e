/* Chains of operations: linear layers, activations, layer norms, sums, embeddings, projections. On one row
   (batch 1) a step of a linear layer is bound by reading and writing W:

       forward   y = f(W x + b)                          one pass that reads W
       pull      d = z f'(y),  m = W^T d                 one pass that reads and writes W,
                 W += alpha d x^T,  b += beta d          over the rows with d != 0 alone

   f is the identity or relu. m meets W as it was before the update, row by row. A row with d = 0
   adds zeros to m and to itself, so it is left out; behind a relu that is about half of them.

   The order of every sum is fixed by this code: it depends neither on where memory lies nor on how
   wide the machine's vectors are, and nothing is fused (-ffp-contract=off, scripts/build_native.py),
   so that all clones, and processors of all kinds, have the same bits. Pointers come as integers (Tensor.data_ptr()); shapes and types
   are the caller's business (rows.py, chain.py).

   A chain steps all its operations in one call. On several rows the products are those of a BLAS,
   whose function the caller gives and whose bits are its own, or, without one, those of products.h. exp() is computed here, without the
   machine's library, whose results differ between versions (cross-entropy still asks that one).

   W: (O, I), x, m: (I,), y, z, d: (O,), b: (O,) or NULL. */

/* Nobody looks at the floating-point flags: so that comparisons can be taken several at once. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif

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

/* products.h needs the compiler's intrinsics for vectors of AVX2 and AVX-512. */
#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_PRODUCTS
#include <immintrin.h>
#endif

/* Kinds of operations, as in chain.py. */
enum { LINEAR, NORM, ACTIVATION, ADD, SCALE, EMBEDDING, PROJECTION };
enum { IDENTITY, RELU, TANH, SIGMOID };                     /* f of an activation or linear layer */
enum { NONE, GIVEN, SENT, FIRST };                          /* places of messages */

/* An operation of a chain, on values of so many rows, from width `in` to `out`. read: its inputs;
   value 0 is x, value i is what operation i - 1 makes. at, d, known: places, in numbers, of its
   output in `inner`, of what is kept of z in d, of a norm's mean and r in `inner`. number: epsilon,
   factor, sign, or the padding's index. */
typedef struct {
    size_t kind, w, b, rows, in, out, act, read[2], at, d, known;
    double number;
} Operation;

/* Where an operation's z lies, where the messages of what it reads go, and to which messages there
   are already they are added. */
typedef struct {
    size_t z, to[2], had[2];
} Way;

/* e^x - 1 = 2^k (e^r - 1) + (2^k - 1) with x = k log 2 + r, |r| < 0.35: a polynomial. The same
   operations for every x, so that a compiler can take several at once. */
static inline __attribute__((always_inline)) double exp_minus_1(double x)
{
    const double shift = 6755399441055744.0; /* 1.5 2^52: rounds, and leaves k in the lowest bits */
    x = x < -708 ? -708 : x;
    x = x > 708 ? 708 : x;
    double moved = x * 1.4426950408889634 + shift, k = moved - shift, p = 1.0 / 6227020800.0, power;
    double r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
    uint64_t bits;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r * r + r;
    memcpy(&bits, &moved, sizeof bits);
    bits = (bits + 1023) << 52;
    memcpy(&power, &bits, sizeof power);
    return power * p + (power - 1);
}

static inline __attribute__((always_inline)) double tanh_of(double x)
{
    double e = exp_minus_1(2 * x);
    return e / (e + 2);
}

static inline __attribute__((always_inline)) double sigmoid_of(double x)
{
    return 1 / (2 + exp_minus_1(-x));
}

/* Whether a linear layer has few rows on a large weight (rows.h), and the parts in which that is
   done. By its shape alone, so that all processes do the same. */
#define FEW_ROWS 63
#define FEW_OUTPUTS 256
#define FEW(o)                                                                                     \
    ((o)->rows >= 8 && (o)->rows <= FEW_ROWS && (o)->in >= 512 &&                                  \
     (o)->rows * (o)->in * (o)->out >= 1 << 22)

static int has_wide_vectors; /* whether products are made with AVX-512, or else with AVX2 */

#ifdef HAS_PRODUCTS
#define REAL float
#define INT int32_t
#define REAL_BITS 32
#define VECTOR_BITS 512
#define NAME(x) x##_f32_512
#include "products.h"
#define VECTOR_BITS 256
#define NAME(x) x##_f32_256
#include "products.h"
#undef REAL
#undef INT
#undef REAL_BITS
#define REAL double
#define INT int64_t
#define REAL_BITS 64
#define VECTOR_BITS 512
#define NAME(x) x##_f64_512
#include "products.h"
#define VECTOR_BITS 256
#define NAME(x) x##_f64_256
#include "products.h"
#undef REAL
#undef INT
#undef REAL_BITS

/* By the vectors of this processor. */
#define CHOSEN(real, REAL)                                                                         \
    static void products_outputs_##real(const REAL *x, const REAL *w, const REAL *b, REAL *y,      \
                                        size_t rows, size_t in, size_t out)                        \
    {                                                                                              \
        (has_wide_vectors ? outputs_##real##_512 : outputs_##real##_256)(x, w, b, y, rows, in,     \
                                                                         out);                     \
    }                                                                                              \
    static void products_pulled_##real(const REAL *x, REAL *w, const REAL *d, REAL *m,             \
                                       size_t rows, size_t in, size_t out, REAL alpha, REAL beta)  \
    {                                                                                              \
        (has_wide_vectors ? pulled_##real##_512 : pulled_##real##_256)(x, w, d, m, rows, in, out,  \
                                                                       alpha, beta);               \
    }                                                                                              \
    static void convolve_##real(const Convolution *c, const REAL *x, const REAL *w, const REAL *b, \
                                REAL *y, REAL *room, size_t *at)                                   \
    {                                                                                              \
        (has_wide_vectors ? convolve_##real##_512 : convolve_##real##_256)(c, x, w, b, y, room,    \
                                                                           at);                    \
    }                                                                                              \
    static void convolve_back_##real(const Convolution *c, const REAL *x, const REAL *w,           \
                                     const REAL *z, REAL *g, REAL *to, REAL *room, size_t *at)     \
    {                                                                                              \
        (has_wide_vectors ? convolve_back_##real##_512 : convolve_back_##real##_256)(              \
            c, x, w, z, g, to, room, at);                                                          \
    }
CHOSEN(f32, float)
CHOSEN(f64, double)
#endif

/* The largest power of two up to n. */
static inline size_t largest_power(size_t n)
{
    size_t m = 1;
    while (m <= n / 2)
        m *= 2;
    return m;
}

/* The upper half of a float's bits, rounded to even; of NaN any NaN. */
static inline uint16_t to_bfloat16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float from_bfloat16(uint16_t code)
{
    uint32_t bits = (uint32_t)code << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

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
static PyThreadState *let_others_run(const Operation *op, size_t n)
{
    return op[n - 1].rows == 1 ? NULL : PyEval_SaveThread();
}

static void go_on(PyThreadState *others)
{
    if (others != NULL)
        PyEval_RestoreThread(others);
}

static PyObject *py_chain_forward(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[7];
    int known;
    (void)self;
    if (!arguments(args, given, a, 7, NULL, 0))
        return NULL;
    const Operation *op = (void *)a[0];
    PyThreadState *others = let_others_run(op, a[1]);
    if (a[6] & DOUBLE)
        known = chain_forward_f64(op, a[1], (void *)a[2], (void *)a[3], (void *)a[4],
                                  (Gemm_f64 *)a[5]);
    else
        known = chain_forward_f32(op, a[1], (void *)a[2], (void *)a[3], (void *)a[4],
                                  (Gemm_f32 *)a[5]);
    go_on(others);
    return PyBool_FromLong(known);
}

static PyObject *py_chain_pull(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[14], most = 0, *active = NULL;
    double limit;
    unsigned long long moved;
    (void)self;
    if (!arguments(args, given, a, 14, &limit, 1))
        return NULL;
    const Operation *op = (void *)a[0];
    const Way *way = (void *)a[1];
    for (size_t i = 0; i < a[2]; i++)
        if (op[i].kind == LINEAR && op[i].rows == 1 && op[i].out > most)
            most = op[i].out;
    if (most && (active = malloc(most * sizeof(size_t))) == NULL)
        return PyErr_NoMemory();
    PyThreadState *others = let_others_run(op, a[2]);
    if (a[13] & DOUBLE)
        moved = chain_pull_f64(op, way, a[2], (void *)a[3], (void *)a[4], (void *)a[5],
                               (void *)a[6], (void *)a[7], (void *)a[8], a[9], (void *)a[10],
                               (void *)a[11], (Gemm_f64 *)a[12], active, limit);
    else
        moved = chain_pull_f32(op, way, a[2], (void *)a[3], (void *)a[4], (void *)a[5],
                               (void *)a[6], (void *)a[7], (void *)a[8], a[9], (void *)a[10],
                               (void *)a[11], (Gemm_f32 *)a[12], active, limit);
    go_on(others);
    free(active);
    return PyLong_FromUnsignedLongLong(moved);
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

static PyObject *py_add_outer(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[7];
    double real[2];
    (void)self;
    if (!arguments(args, given, a, 7, real, 2))
        return NULL;
#ifdef HAS_PRODUCTS
    PyThreadState *others = PyEval_SaveThread();
    if (a[6] & DOUBLE)
        products_pulled_f64((void *)a[2], (void *)a[0], (void *)a[1], NULL, a[3], a[4], a[5],
                            real[0], real[1]);
    else
        products_pulled_f32((void *)a[2], (void *)a[0], (void *)a[1], NULL, a[3], a[4], a[5],
                            (float)real[0], (float)real[1]);
    PyEval_RestoreThread(others);
#endif
    Py_RETURN_NONE;
}

#ifdef HAS_PRODUCTS
/* Room for the places of a convolution's products; sets an error where there is none. */
static size_t *places_for(const Convolution *c)
{
    size_t most = c->channels > c->outputs ? c->channels : c->outputs;
    size_t *at = malloc((most * c->kernel[0] * c->kernel[1] + 1) * sizeof(size_t));
    if (at == NULL)
        PyErr_NoMemory();
    return at;
}

static PyObject *py_convolution_room(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[2];
    (void)self;
    if (!arguments(args, given, a, 2, NULL, 0))
        return NULL;
    return PyLong_FromSize_t(convolution_room((void *)a[0], a[1] != 0));
}

static PyObject *py_convolve(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[7], *at;
    (void)self;
    if (!arguments(args, given, a, 7, NULL, 0) || (at = places_for((void *)a[0])) == NULL)
        return NULL;
    PyThreadState *others = PyEval_SaveThread();
    if (a[6] & DOUBLE)
        convolve_f64((void *)a[0], (void *)a[1], (void *)a[2], (void *)a[3], (void *)a[4],
                     (void *)a[5], at);
    else
        convolve_f32((void *)a[0], (void *)a[1], (void *)a[2], (void *)a[3], (void *)a[4],
                     (void *)a[5], at);
    PyEval_RestoreThread(others);
    free(at);
    Py_RETURN_NONE;
}

static PyObject *py_convolve_back(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[8], *at;
    (void)self;
    if (!arguments(args, given, a, 8, NULL, 0) || (at = places_for((void *)a[0])) == NULL)
        return NULL;
    PyThreadState *others = PyEval_SaveThread();
    if (a[7] & DOUBLE)
        convolve_back_f64((void *)a[0], (void *)a[1], (void *)a[2], (void *)a[3], (void *)a[4],
                          (void *)a[5], (void *)a[6], at);
    else
        convolve_back_f32((void *)a[0], (void *)a[1], (void *)a[2], (void *)a[3], (void *)a[4],
                          (void *)a[5], (void *)a[6], at);
    PyEval_RestoreThread(others);
    free(at);
    Py_RETURN_NONE;
}
#endif

static PyObject *py_rotate(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[7];
    (void)self;
    if (!arguments(args, given, a, 7, NULL, 0))
        return NULL;
    PyThreadState *others = PyEval_SaveThread();
    if (a[6] & DOUBLE)
        rotate_f64((void *)a[0], (void *)a[1], (void *)a[2], a[3], a[4], a[5] != 0);
    else
        rotate_f32((void *)a[0], (void *)a[1], (void *)a[2], a[3], a[4], a[5] != 0);
    PyEval_RestoreThread(others);
    Py_RETURN_NONE;
}

static PyObject *py_to_nibbles(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[6];
    (void)self;
    if (!arguments(args, given, a, 6, NULL, 0))
        return NULL;
    void *room = malloc((a[4] + 1) * sizeof(double));
    if (room == NULL)
        return PyErr_NoMemory();
    PyThreadState *others = PyEval_SaveThread();
    int finite = a[5] & DOUBLE
                     ? to_nibbles_f64((void *)a[0], (void *)a[1], (void *)a[2], room, a[3], a[4])
                     : to_nibbles_f32((void *)a[0], (void *)a[1], (void *)a[2], room, a[3], a[4]);
    PyEval_RestoreThread(others);
    free(room);
    return PyBool_FromLong(finite);
}

static PyObject *py_from_nibbles(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t a[6];
    (void)self;
    if (!arguments(args, given, a, 6, NULL, 0))
        return NULL;
    PyThreadState *others = PyEval_SaveThread();
    if (a[5] & DOUBLE)
        from_nibbles_f64((void *)a[0], (void *)a[1], (void *)a[2], a[3], a[4]);
    else
        from_nibbles_f32((void *)a[0], (void *)a[1], (void *)a[2], a[3], a[4]);
    PyEval_RestoreThread(others);
    Py_RETURN_NONE;
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

/* Returns whether products were made with AVX-512, and sets it; AVX2 gives the same bits. */
static PyObject *py_use_wide_vectors(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    size_t wanted;
    long before = has_wide_vectors;
    (void)self;
    if (!arguments(args, given, &wanted, 1, NULL, 0))
        return NULL;
    has_wide_vectors = wanted != 0;
    return PyBool_FromLong(before);
}

static PyMethodDef METHODS[] = {
    {"chain_forward", (PyCFunction)(void (*)(void))py_chain_forward, METH_FASTCALL,
     "chain_forward(operations, n, x, inner, y, gemm, flags) -> whether all indices are known: y, the\n"
     "outputs of the others in `inner`. gemm: the address of a BLAS's function; 0 for one row, and for\n"
     "the products of products.h."},
    {"chain_pull", (PyCFunction)(void (*)(void))py_chain_pull, METH_FASTCALL,
     "chain_pull(operations, ways, n, x, inner, y, z, d, m, apart, to, rates, gemm, flags, limit) ->\n"
     "bit i: the weights of operation i have moved. m: room for messages, so many numbers apart; to:\n"
     "of x; rates: of W and b, by operation, or 0. Where a number that the norm of their gradient does\n"
     "not exceed, |d| sqrt(|x|^2 [alpha != 0] + R [beta != 0]) of a linear layer, is above the limit,\n"
     "or NaN, they stay as they are."},
    {"cross_entropy", (PyCFunction)(void (*)(void))py_cross_entropy, METH_FASTCALL,
     "cross_entropy(y, classes, loss, d, rows, n, -ignored, flags) -> whether all classes are\n"
     "known: the mean loss, and its slope d."},
    {"add_outer", (PyCFunction)(void (*)(void))py_add_outer, METH_FASTCALL,
     "add_outer(w, z, x, rows, in, out, flags, alpha, beta): w = beta w + alpha z^T x, by products.h."},
#ifdef HAS_PRODUCTS
    {"convolution_room", (PyCFunction)(void (*)(void))py_convolution_room, METH_FASTCALL,
     "convolution_room(sizes, back) -> the numbers of room that a pass needs."},
    {"convolve", (PyCFunction)(void (*)(void))py_convolve, METH_FASTCALL,
     "convolve(sizes, x, w, b, y, room, flags): y = x * W + b; see convolution.h."},
    {"convolve_back", (PyCFunction)(void (*)(void))py_convolve_back, METH_FASTCALL,
     "convolve_back(sizes, x, w, z, g, to, room, flags): gradients g (O, K + 1) and message to."},
#endif
    {"use_wide_vectors", (PyCFunction)(void (*)(void))py_use_wide_vectors, METH_FASTCALL,
     "use_wide_vectors(whether) -> whether products.h used AVX-512 before, where the processor has it."},
    {"rotate", (PyCFunction)(void (*)(void))py_rotate, METH_FASTCALL,
     "rotate(x, signs, y, rows, n, back, flags): y = R x, or R^T x; see rotation.h."},
    {"to_nibbles", (PyCFunction)(void (*)(void))py_to_nibbles, METH_FASTCALL,
     "to_nibbles(x, signs, sent, rows, n, flags) -> whether all is finite: R x in 4 bits a number."},
    {"from_nibbles", (PyCFunction)(void (*)(void))py_from_nibbles, METH_FASTCALL,
     "from_nibbles(sent, signs, y, rows, n, flags): the vectors y of such bytes."},
    {"norm", (PyCFunction)(void (*)(void))py_norm, METH_FASTCALL,
     "norm(x, n, flags) -> the Euclidean norm."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_rows", "Chains of operations; see rows.py.", -1, METHODS,
    NULL, NULL, NULL, NULL,
};

/* The rows up to which products.h serves in this process; 0: it does not. Intel's library has kernels
   of AVX-512 for Intel's processors alone, and from some rows on its kernels of AVX2 are faster than
   ours. In the branch that it has for all processors (engine.bits: portable) it is slow, and ours have
   the same bits everywhere. */
static long product_rows(void)
{
#ifdef HAS_PRODUCTS
    const char *branch = getenv("MKL_CBWR");
    __builtin_cpu_init();
    has_wide_vectors = __builtin_cpu_supports("avx512f") != 0;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return 0;
    if (branch != NULL && strcmp(branch, "COMPATIBLE") == 0)
        return 1L << 30;
    if (__builtin_cpu_is("intel"))
        return 8;
    return has_wide_vectors ? 1L << 30 : 16;
#else
    return 0;
#endif
}

PyMODINIT_FUNC PyInit__rows(void)
{
    PyObject *module = PyModule_Create(&MODULE);
    fill_signs_f32();
    fill_signs_f64();
    if (module != NULL && (PyModule_AddIntConstant(module, "LAYOUT", 6) < 0 || /* as in rows.py */
                           PyModule_AddIntConstant(module, "PRODUCT_ROWS", product_rows()) < 0)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
