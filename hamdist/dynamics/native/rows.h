/* The arithmetic of rows.c for one type: REAL, with names made by NAME. */

#define VECTOR NAME(vector)
#define LANES NAME(lanes)
#define GROUP 4

typedef REAL VECTOR __attribute__((vector_size(64), aligned(sizeof(REAL)), may_alias));
enum { LANES = 64 / sizeof(REAL) };

/* (macros: a function that returns a vector would have an ABI of its own for each width) */
#define AT(p) (*(VECTOR *)(p))
#define OF(p) (*(const VECTOR *)(p))

#include "rotation.h"

/* The sum of the lanes of a + b, halved again and again. */
static inline __attribute__((always_inline)) REAL NAME(folded)(const VECTOR *a, const VECTOR *b)
{
    REAL part[LANES];
    AT(part) = *a + *b;
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            part[i] += part[i + half];
    return part[0];
}

/* sum[r] = W_r x for `many` (1 or GROUP) rows: two vectors of partial sums each, then the rest. */
static inline __attribute__((always_inline)) void
NAME(products)(const REAL *w, const REAL *x, REAL *sum, size_t n, int many)
{
    VECTOR a[GROUP], b[GROUP];
    size_t i = 0;
    for (int r = 0; r < many; r++)
        a[r] = b[r] = (VECTOR){0};
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        VECTOR x0 = OF(x + i), x1 = OF(x + i + LANES);
        for (int r = 0; r < many; r++) {
            a[r] += OF(w + r * n + i) * x0;
            b[r] += OF(w + r * n + i + LANES) * x1;
        }
    }
    for (int r = 0; r < many; r++)
        sum[r] = NAME(folded)(&a[r], &b[r]);
    for (; i < n; i++)
        for (int r = 0; r < many; r++)
            sum[r] += w[r * n + i] * x[i];
}

CLONES static void NAME(one_forward)(const REAL *w, const REAL *bias, const REAL *x, REAL *y,
                                     size_t out, size_t in)
{
    REAL sum[GROUP];
    size_t o = 0;
    for (; o + GROUP <= out; o += GROUP) {
        NAME(products)(w + o * in, x, sum, in, GROUP);
        for (int r = 0; r < GROUP; r++)
            y[o + r] = bias ? sum[r] + bias[o + r] : sum[r];
    }
    for (; o < out; o++) {
        NAME(products)(w + o * in, x, sum, in, 1);
        y[o] = bias ? sum[0] + bias[o] : sum[0];
    }
}

/* Sums in doubles: no square of a float overflows. */
CLONES static double NAME(squares)(const REAL *x, size_t n)
{
    double part[16] = {0};
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++)
            part[j] += (double)x[i + j] * (double)x[i + j];
    for (; i < n; i++)
        part[0] += (double)x[i] * (double)x[i];
    for (int half = 8; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            part[j] += part[j + half];
    return part[0];
}

/* m += W^T d and W += alpha d x^T over `many` rows of W; `m` NULL or alpha 0 leaves that out. */
static inline __attribute__((always_inline)) void
NAME(rows)(REAL *w, const size_t *row, const REAL *x, const REAL *d, REAL *m, size_t n, REAL alpha,
           int many, int wanted, int moves)
{
    REAL *at[GROUP], z[GROUP], step[GROUP];
    size_t i = 0;
    for (int r = 0; r < many; r++) {
        at[r] = w + row[r] * n;
        z[r] = d[row[r]];
        step[r] = alpha * z[r];
    }
    for (; i + LANES <= n; i += LANES) {
        VECTOR sum, one = moves ? OF(x + i) : (VECTOR){0};
        if (wanted)
            sum = OF(m + i);
        for (int r = 0; r < many; r++) {
            VECTOR v = OF(at[r] + i);
            if (wanted)
                sum += v * z[r];
            if (moves)
                AT(at[r] + i) = v + one * step[r];
        }
        if (wanted)
            AT(m + i) = sum;
    }
    for (; i < n; i++)
        for (int r = 0; r < many; r++) {
            REAL v = at[r][i];
            if (wanted)
                m[i] += v * z[r];
            if (moves)
                at[r][i] = v + x[i] * step[r];
        }
}

static inline __attribute__((always_inline)) void
NAME(all_rows)(REAL *w, const size_t *active, size_t count, const REAL *x, const REAL *d, REAL *m,
               size_t n, REAL alpha, int wanted, int moves)
{
    size_t a = 0;
    for (; a + GROUP <= count; a += GROUP)
        NAME(rows)(w, active + a, x, d, m, n, alpha, GROUP, wanted, moves);
    for (; a < count; a++)
        NAME(rows)(w, active + a, x, d, m, n, alpha, 1, wanted, moves);
}

/* m = W^T d and the update of one row, over the rows of W with d != 0 (NaN counts). active: room
   for their numbers. */
CLONES static void NAME(one_pull)(REAL *w, const REAL *x, const REAL *d, REAL *m, size_t out,
                                  size_t in, size_t *active, REAL alpha)
{
    size_t count = 0;
    for (size_t o = 0; o < out; o++)
        if (d[o] != 0)
            active[count++] = o;
    if (m != NULL)
        memset(m, 0, in * sizeof(REAL));
    if (alpha != 0 && m != NULL)
        NAME(all_rows)(w, active, count, x, d, m, in, alpha, 1, 1);
    else if (alpha != 0)
        NAME(all_rows)(w, active, count, x, d, m, in, alpha, 0, 1);
    else if (m != NULL)
        NAME(all_rows)(w, active, count, x, d, m, in, 0, 1, 0);
}

/* b += beta times the sum of the rows of d: 64 bytes of columns at a time, row after row. */
CLONES static void NAME(columns)(REAL *b, const REAL *d, size_t rows, size_t n, REAL beta)
{
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        VECTOR sum = {0};
        for (size_t r = 0; r < rows; r++)
            sum += OF(d + r * n + i);
        AT(b + i) = OF(b + i) + sum * beta;
    }
    for (; i < n; i++) {
        REAL sum = 0;
        for (size_t r = 0; r < rows; r++)
            sum += d[r * n + i];
        b[i] += sum * beta;
    }
}

/* Softmax cross-entropy of `rows` rows y with classes k, the mean over those whose class is not
   `ignored`: the loss, and its slope d = (softmax(y) - one hot) / counted. In doubles. Returns 0
   for a class that there is not. */
static int NAME(cross_entropy)(const REAL *y, const int64_t *k, REAL *loss, REAL *d, size_t rows,
                               size_t n, int64_t ignored)
{
    double sum = 0, counted = 0;
    for (size_t r = 0; r < rows; r++) {
        if (k[r] != ignored && (k[r] < 0 || (size_t)k[r] >= n))
            return 0;
        counted += k[r] != ignored;
    }
    for (size_t r = 0; r < rows; r++, y += n, d += n) {
        if (k[r] == ignored) {
            memset(d, 0, n * sizeof(REAL));
            continue;
        }
        double most = y[0], total = 0;
        for (size_t i = 1; i < n; i++)
            most = y[i] > most ? y[i] : most;
        for (size_t i = 0; i < n; i++)
            total += exp(y[i] - most);
        sum += log(total) - (y[k[r]] - most);
        for (size_t i = 0; i < n; i++)
            d[i] = (REAL)((exp(y[i] - most) / total - (i == (size_t)k[r])) / counted);
    }
    *loss = (REAL)(sum / counted); /* of no row: NaN, as torch has it */
    return 1;
}

/* -- several rows: x (R, I), y, z, d (R, O).

   A matrix of rows is the transposed one to the Fortran interface of a BLAS, which has columns:

       y = x W^T + b      y^T = W x^T + b            (O, R), W^T as it lies: 'T', 'N'
       m = d W            m^T = W^T d^T              (I, R): 'N', 'N'
       W += alpha d^T x   W^T += alpha x^T d         (I, O): 'N', 'T'

   Its integers have 4 or 8 bytes; where the lowest come first (rows.py sees to it), the address of
   one of 8 serves both. */

typedef void NAME(Gemm)(const char *, const char *, const int64_t *, const int64_t *,
                        const int64_t *, const REAL *, const REAL *, const int64_t *,
                        const REAL *, const int64_t *, const REAL *, REAL *, const int64_t *);

/* f of every number; act: its number in rows.c. y may be x. */
CLONES static void NAME(activate)(const REAL *x, REAL *y, size_t n, size_t act)
{
    if (act == RELU)
        for (size_t i = 0; i < n; i++)
            y[i] = x[i] < 0 ? 0 : x[i];
    else if (act == TANH)
        for (size_t i = 0; i < n; i++)
            y[i] = (REAL)tanh_of(x[i]);
    else if (act == SIGMOID)
        for (size_t i = 0; i < n; i++)
            y[i] = (REAL)sigmoid_of(x[i]);
}

/* d = z f', which follows from y = f(x). d may be z. */
CLONES static void NAME(slopes)(const REAL *z, const REAL *y, REAL *d, size_t n, size_t act)
{
    if (act == RELU)
        for (size_t i = 0; i < n; i++)
            d[i] = y[i] <= 0 ? 0 : z[i];
    else if (act == TANH)
        for (size_t i = 0; i < n; i++)
            d[i] = z[i] * (1 - y[i] * y[i]);
    else if (act == SIGMOID)
        for (size_t i = 0; i < n; i++)
            d[i] = z[i] * (1 - y[i]) * y[i];
    else
        memmove(d, z, n * sizeof(REAL));
}

/* to = a + s b. */
CLONES static void NAME(sum)(const REAL *a, const REAL *b, REAL *to, size_t n, REAL s)
{
    for (size_t i = 0; i < n; i++)
        to[i] = a[i] + s * b[i];
}

CLONES static void NAME(scale)(const REAL *x, REAL *to, size_t n, REAL s)
{
    for (size_t i = 0; i < n; i++)
        to[i] = s * x[i];
}

/* -- layer norm, row by row, sums in doubles:
       y = (x - mean) r w + b,   r = (variance + e)^(-1/2);      with u = z w, v = (x - mean) r
       m = r (u - mean(u) - v mean(u v)),   g_w = sum z v,   g_b = sum z */

#define SUM8(total, term)                                                                          \
    do {                                                                                           \
        double part[8] = {0};                                                                      \
        size_t i = 0;                                                                              \
        for (; i + 8 <= n; i += 8)                                                                 \
            for (size_t j = 0; j < 8; j++)                                                         \
                part[j] += term(i + j);                                                            \
        for (; i < n; i++)                                                                         \
            part[0] += term(i);                                                                    \
        total = ((part[0] + part[4]) + (part[2] + part[6])) +                                      \
                ((part[1] + part[5]) + (part[3] + part[7]));                                       \
    } while (0)

CLONES static void NAME(norm_forward)(const REAL *x, REAL *y, double *known, const REAL *w,
                                      const REAL *b, size_t rows, size_t n, double epsilon)
{
    for (size_t row = 0; row < rows; row++, x += n, y += n, known += 2) {
        double mean, squares;
#define TERM(i) (double)x[i]
        SUM8(mean, TERM);
#undef TERM
        mean /= (double)n;
#define TERM(i) (x[i] - mean) * (x[i] - mean)
        SUM8(squares, TERM);
#undef TERM
        double r = 1 / sqrt(squares / (double)n + epsilon);
        known[0] = mean;
        known[1] = r;
        if (w == NULL)
            for (size_t i = 0; i < n; i++)
                y[i] = (REAL)((x[i] - mean) * r);
        else
            for (size_t i = 0; i < n; i++)
                y[i] = (REAL)((x[i] - mean) * r * w[i] + (b ? b[i] : 0));
    }
}

/* to: NULL, or where m goes; it may be z. g: g_w and g_b where there is a w. */
CLONES static void NAME(norm_pull)(const REAL *x, const REAL *z, const double *known, const REAL *w,
                                   REAL *g, REAL *to, size_t rows, size_t n)
{
    if (w != NULL)
        memset(g, 0, 2 * n * sizeof(REAL));
    for (size_t row = 0; row < rows; row++, x += n, z += n, known += 2) {
        double mean = known[0], r = known[1], mean_u, mean_uv;
        for (size_t i = 0; w != NULL && i < n; i++) {
            g[i] += (REAL)(z[i] * ((x[i] - mean) * r));
            g[n + i] += z[i];
        }
        if (to == NULL)
            continue;
#define U(i) (w ? (double)z[i] * w[i] : (double)z[i])
#define TERM(i) U(i) * ((x[i] - mean) * r)
        SUM8(mean_u, U);
        SUM8(mean_uv, TERM);
        mean_u /= (double)n;
        mean_uv /= (double)n;
        for (size_t i = 0; i < n; i++)
            to[i] = (REAL)(r * (U(i) - mean_u - (x[i] - mean) * r * mean_uv));
#undef TERM
#undef U
        to += n;
    }
}
#undef SUM8

/* -- linear layers */

/* y = x W^T + b of few rows and a large W, as (W x^T)^T, in which the BLAS does not copy W: 1.3 to
   1.8 times as fast for 8 to 32 rows of 1024 numbers, with other bits than torch's. */
static void NAME(few_rows_forward)(const Operation *o, const REAL *x, REAL *y, NAME(Gemm) *gemm)
{
    const REAL one = 1, none = 0, *w = (const REAL *)o->w, *bias = (const REAL *)o->b;
    const int64_t in = o->in, many = o->rows;
    REAL columns[FEW_OUTPUTS * FEW_ROWS];
    for (size_t first = 0; first < o->out; first += FEW_OUTPUTS) {
        const int64_t outs = o->out - first < FEW_OUTPUTS ? o->out - first : FEW_OUTPUTS;
        gemm("T", "N", &many, &outs, &in, &one, x, &in, w + first * o->in, &in, &none, columns,
             &many);
        for (size_t r = 0; r < o->rows; r++)
            for (int64_t i = 0; i < outs; i++)
                y[r * o->out + first + i] = columns[i * many + r] + (bias ? bias[first + i] : 0);
    }
}

static void NAME(linear_forward)(const Operation *o, const REAL *x, REAL *y, NAME(Gemm) *gemm)
{
    const REAL one = 1, none = 0, *w = (const REAL *)o->w, *bias = (const REAL *)o->b;
    const int64_t out = o->out, in = o->in, many = o->rows;
    if (o->rows == 1) {
        NAME(one_forward)(w, bias, x, y, o->out, o->in);
#ifdef HAS_PRODUCTS
    } else if (gemm == NULL) {
        NAME(products_outputs)(x, w, bias, y, o->rows, o->in, o->out);
#endif
    } else if (FEW(o)) {
        NAME(few_rows_forward)(o, x, y, gemm);
    } else {
        for (size_t r = 0; bias && r < o->rows; r++)
            memcpy(y + r * o->out, bias, o->out * sizeof(REAL));
        gemm("T", "N", &out, &many, &in, &one, w, &in, x, &in, bias ? &one : &none, y, &out);
    }
    NAME(activate)(y, y, o->rows * o->out, o->act);
}

/* Where a weight moves, its rate is not 0; the bound is that of its layer's gradient. */
static int NAME(linear_pull)(const Operation *o, const REAL *x, const REAL *z, const REAL *y,
                             REAL *d, REAL *m, NAME(Gemm) *gemm, size_t *active, double alpha,
                             double beta, double limit)
{
    const REAL one = 1, none = 0;
    const size_t outs = o->rows * o->out;
    const int64_t out = o->out, in = o->in, many = o->rows;
    REAL step = (REAL)alpha, *w = (REAL *)o->w, *bias = (REAL *)o->b;
    NAME(slopes)(z, y, d, outs, o->act);
    int moves = alpha != 0 || beta != 0;
    if (moves) {
        double reach = beta != 0 ? (double)o->rows : 0;
        if (alpha != 0)
            reach += NAME(squares)(x, o->rows * o->in);
        moves = sqrt(NAME(squares)(d, outs) * reach) <= limit; /* NaN is above it */
    }
    step = moves ? step : 0;
    if (o->rows == 1) {
        NAME(one_pull)(w, x, d, m, o->out, o->in, active, step);
#ifdef HAS_PRODUCTS
    } else if (gemm == NULL) {
        NAME(products_pulled)(x, w, d, m, o->rows, o->in, o->out, step, 1);
#endif
    } else {
        if (m)
            gemm("N", "N", &in, &many, &out, &one, w, &in, d, &out, &none, m, &in);
        if (step != 0)
            gemm("N", "T", &in, &out, &many, &step, x, &in, d, &out, &one, w, &in);
    }
    if (moves && beta != 0 && bias)
        NAME(columns)(bias, d, o->rows, o->out, (REAL)beta);
    return moves;
}

/* -- all operations */

#define VALUE(i) ((i) == 0 ? x : (i) == n ? y : inner + op[(i) - 1].at)

/* Returns 0 for an index that is in no table. */
static int NAME(chain_forward)(const Operation *op, size_t n, const REAL *x, REAL *inner, REAL *y,
                               NAME(Gemm) *gemm)
{
    for (size_t i = 0; i < n; i++) {
        const Operation *o = &op[i];
        const REAL *a = VALUE(o->read[0]);
        REAL *to = i == n - 1 ? y : inner + o->at;
        const size_t outs = o->rows * o->out;
        const int64_t *index = (const int64_t *)a;
        switch (o->kind) {
        case LINEAR:
            NAME(linear_forward)(o, a, to, gemm);
            break;
        case NORM:
            NAME(norm_forward)(a, to, (double *)(inner + o->known), (const REAL *)o->w,
                               (const REAL *)o->b, o->rows, o->out, o->number);
            break;
        case ACTIVATION:
            NAME(activate)(a, to, outs, o->act);
            break;
        case ADD:
            NAME(sum)(a, VALUE(o->read[1]), to, outs, (REAL)o->number);
            break;
        case SCALE:
            NAME(scale)(a, to, outs, (REAL)o->number);
            break;
        case PROJECTION:
            NAME(project)(a, (const REAL *)o->b, to, o->rows, o->out);
            break;
        default:
            for (size_t r = 0; r < o->rows; r++) {
                if (index[r] < 0 || (size_t)index[r] >= o->in)
                    return 0;
                memcpy(to + r * o->out, (const REAL *)o->w + index[r] * o->out,
                       o->out * sizeof(REAL));
            }
        }
    }
    return 1;
}

/* What is kept of z in d, and the updates; the message of the first value read goes to m. */
static int NAME(operation_pull)(const Operation *o, const REAL *x, const REAL *z, const REAL *y,
                                const REAL *inner, REAL *d, REAL *m, NAME(Gemm) *gemm,
                                size_t *active, const double *rates, double limit)
{
    const size_t outs = o->rows * o->out;
    double alpha = rates ? rates[0] : 0, beta = rates ? rates[1] : 0;
    const int64_t *index = (const int64_t *)x;
    int moves = alpha != 0 || beta != 0;
    switch (o->kind) {
    case LINEAR:
        return NAME(linear_pull)(o, x, z, y, d, m, gemm, active, alpha, beta, limit);
    case NORM:
        NAME(norm_pull)(x, z, (const double *)(inner + o->known), (const REAL *)o->w, d, m, o->rows,
                        o->out);
        moves = moves && o->w && sqrt(NAME(squares)(d, 2 * o->out)) <= limit;
        if (moves)
            NAME(sum)((REAL *)o->w, d, (REAL *)o->w, o->out, (REAL)alpha);
        if (moves && o->b)
            NAME(sum)((REAL *)o->b, d + o->out, (REAL *)o->b, o->out, (REAL)beta);
        return moves;
    case ACTIVATION:
        if (m)
            NAME(slopes)(z, y, m, outs, o->act);
        return 0;
    case PROJECTION: /* (symmetric) */
        if (m)
            NAME(project)(z, (const REAL *)o->b, m, o->rows, o->out);
        return 0;
    case EMBEDDING:
        for (size_t r = 0; r < o->rows; r++)
            if ((double)index[r] == o->number) /* padding */
                memset(d + r * o->out, 0, o->out * sizeof(REAL));
            else
                memcpy(d + r * o->out, z + r * o->out, o->out * sizeof(REAL));
        moves = moves && sqrt(NAME(squares)(d, outs) * (double)o->rows) <= limit;
        for (size_t r = 0; moves && r < o->rows; r++) {
            REAL *row = (REAL *)o->w + index[r] * o->out;
            NAME(sum)(row, d + r * o->out, row, o->out, (REAL)alpha);
        }
        return moves;
    default:
        if (m)
            NAME(scale)(z, m, outs, o->kind == SCALE ? (REAL)o->number : 1);
        return 0;
    }
}

/* From the last operation to the first. A place of a message: NONE, GIVEN (z), SENT (to), or one in
   m, so many numbers apart. active: of one row, room for the outputs of the widest layer. */
static unsigned long long NAME(chain_pull)(const Operation *op, const Way *way, size_t n,
                                           const REAL *x, const REAL *inner, const REAL *y,
                                           REAL *z, REAL *d, REAL *m, size_t apart, REAL *to,
                                           const double *rates, NAME(Gemm) *gemm, size_t *active,
                                           double limit)
{
    unsigned long long moved = 0;
#define PLACE(p) ((p) == NONE ? NULL : (p) == GIVEN ? z : (p) == SENT ? to : m + ((p) - FIRST) * apart)
    for (size_t i = n; i-- > 0;) {
        const Operation *o = &op[i];
        if (way[i].z == NONE)
            continue;
        const REAL *about = PLACE(way[i].z);
        REAL *first = PLACE(way[i].to[0]), *second = PLACE(way[i].to[1]);
        const REAL *had = PLACE(way[i].had[0]);
        const size_t ins = o->kind == LINEAR ? o->rows * o->in : o->rows * o->out;
        if (NAME(operation_pull)(o, VALUE(o->read[0]), about, VALUE(i + 1), inner, d + o->d, first,
                                 gemm, active, rates ? rates + 2 * i : NULL, limit))
            moved |= 1ULL << i;
        if (first && had)
            NAME(sum)(had, first, first, ins, 1);
        if (!second)
            continue;
        had = PLACE(way[i].had[1]);
        if (had)
            NAME(sum)(had, about, second, ins, (REAL)o->number);
        else
            NAME(scale)(about, second, ins, (REAL)o->number);
    }
    return moved;
#undef PLACE
}

#undef VALUE
#undef AT
#undef OF
#undef VECTOR
#undef LANES
#undef GROUP
