/* The arithmetic of rows.c for one type: REAL, with names made by NAME. */

#define VECTOR NAME(vector)
#define LANES NAME(lanes)
#define GROUP 4

typedef REAL VECTOR __attribute__((vector_size(64), aligned(sizeof(REAL)), may_alias));
enum { LANES = 64 / sizeof(REAL) };

/* (macros: a function that returns a vector would have an ABI of its own for each width) */
#define AT(p) (*(VECTOR *)(p))
#define OF(p) (*(const VECTOR *)(p))

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

static inline void NAME(finish)(const REAL *bias, REAL *y, size_t o, REAL sum, int relu)
{
    REAL value = bias ? sum + bias[o] : sum;
    y[o] = relu && value < 0 ? 0 : value;
}

CLONES static void NAME(forward)(const REAL *w, const REAL *bias, const REAL *x, REAL *y,
                                 size_t out, size_t in, int relu)
{
    REAL sum[GROUP];
    size_t o = 0;
    for (; o + GROUP <= out; o += GROUP) {
        NAME(products)(w + o * in, x, sum, in, GROUP);
        for (int r = 0; r < GROUP; r++)
            NAME(finish)(bias, y, o + r, sum[r], relu);
    }
    for (; o < out; o++) {
        NAME(products)(w + o * in, x, sum, in, 1);
        NAME(finish)(bias, y, o, sum[0], relu);
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

CLONES static int NAME(pull)(REAL *w, REAL *bias, const REAL *x, const REAL *z, const REAL *y,
                             REAL *d, REAL *m, size_t out, size_t in, size_t *active, double alpha,
                             double beta, double limit)
{
    size_t count = 0;
    for (size_t o = 0; o < out; o++) {
        d[o] = y != NULL && y[o] <= 0 ? 0 : z[o];
        if (d[o] != 0) /* NaN counts */
            active[count++] = o;
    }
    int moves = alpha != 0 || beta != 0;
    if (moves) {
        double reach = (alpha != 0 ? NAME(squares)(x, in) : 0) + (beta != 0);
        moves = sqrt(NAME(squares)(d, out) * reach) <= limit;
    }
    if (m != NULL)
        memset(m, 0, in * sizeof(REAL));
    if (moves && alpha != 0) {
        if (m != NULL)
            NAME(all_rows)(w, active, count, x, d, m, in, (REAL)alpha, 1, 1);
        else
            NAME(all_rows)(w, active, count, x, d, m, in, (REAL)alpha, 0, 1);
    } else if (m != NULL) {
        NAME(all_rows)(w, active, count, x, d, m, in, 0, 1, 0);
    }
    if (moves && beta != 0 && bias != NULL)
        for (size_t o = 0; o < out; o++)
            bias[o] += (REAL)beta * d[o];
    return moves;
}

/* Of several rows: d = z, 0 where y <= 0; the sum of d's squares. */
CLONES static double NAME(masked)(const REAL *z, const REAL *y, REAL *d, size_t n)
{
    for (size_t i = 0; i < n; i++)
        d[i] = y[i] <= 0 ? 0 : z[i];
    return NAME(squares)(d, n);
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

/* -- several rows: x (R, I), y, z, d (R, O); a layer's part of `inner` and of d is filled up to a
   multiple of 64 bytes.

   A matrix of rows is the transposed one to the Fortran interface of a BLAS, which has columns:

       y = x W^T + b      y^T = W x^T + b            (O, R), W^T as it lies: 'T', 'N'
       m = d W            m^T = W^T d^T              (I, R): 'N', 'N'
       W += alpha d^T x   W^T += alpha x^T d         (I, O): 'N', 'T'

   Its integers have 4 or 8 bytes; where the lowest come first (rows.py sees to it), the address of
   one of 8 serves both. */

typedef void NAME(Gemm)(const char *, const char *, const int64_t *, const int64_t *,
                        const int64_t *, const REAL *, const REAL *, const int64_t *,
                        const REAL *, const int64_t *, const REAL *, REAL *, const int64_t *);

CLONES static void NAME(cut)(REAL *y, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] = y[i] < 0 ? 0 : y[i];
}

static void NAME(many_forward)(const Layer *layer, const REAL *x, REAL *y, size_t rows,
                               NAME(Gemm) *gemm)
{
    const REAL one = 1, none = 0, *bias = (const REAL *)layer->b;
    const int64_t out = layer->out, in = layer->in, many = rows;
    for (size_t r = 0; bias && r < rows; r++)
        memcpy(y + r * layer->out, bias, layer->out * sizeof(REAL));
    gemm("T", "N", &out, &many, &in, &one, (const REAL *)layer->w, &in, x, &in,
         bias ? &one : &none, y, &out);
    if (layer->relu)
        NAME(cut)(y, rows * layer->out);
}

static int NAME(many_pull)(const Layer *layer, const REAL *x, const REAL *z, const REAL *y, REAL *d,
                           REAL *m, size_t rows, NAME(Gemm) *gemm, double alpha, double beta,
                           double limit)
{
    const REAL one = 1, none = 0, step = (REAL)alpha;
    const size_t outs = rows * layer->out;
    const int64_t out = layer->out, in = layer->in, many = rows;
    double squares;
    if (layer->relu) {
        squares = NAME(masked)(z, y, d, outs);
    } else {
        memcpy(d, z, outs * sizeof(REAL));
        squares = NAME(squares)(d, outs);
    }
    if (m)
        gemm("N", "N", &in, &many, &out, &one, (const REAL *)layer->w, &in, d, &out, &none, m, &in);
    if (alpha == 0 && beta == 0)
        return 0;
    double reach = beta != 0 ? (double)rows : 0;
    if (alpha != 0)
        reach += NAME(squares)(x, rows * layer->in);
    if (!(sqrt(squares * reach) <= limit)) /* NaN is above it */
        return 0;
    if (alpha != 0)
        gemm("N", "T", &in, &out, &many, &step, x, &in, d, &out, &one, (REAL *)layer->w, &in);
    if (beta != 0 && layer->b)
        NAME(columns)((REAL *)layer->b, d, rows, layer->out, (REAL)beta);
    return 1;
}

/* -- all layers; one row has products of its own */

static void NAME(chain_forward)(const Layer *layer, size_t n, const REAL *x, REAL *inner, REAL *y,
                                size_t rows, NAME(Gemm) *gemm)
{
    for (size_t l = 0; l < n; l++) {
        REAL *to = l == n - 1 ? y : inner;
        if (rows == 1)
            NAME(forward)((const REAL *)layer[l].w, (const REAL *)layer[l].b, x, to, layer[l].out,
                          layer[l].in, layer[l].relu != 0);
        else
            NAME(many_forward)(&layer[l], x, to, rows, gemm);
        x = to;
        inner += FILLED(rows * layer[l].out);
    }
}

/* From the last layer to the first; z of a layer is the message of the one above. active: of one
   row, room for the numbers of the outputs of the widest layer. */
static unsigned long long NAME(chain_pull)(const Layer *layer, size_t n, const REAL *x,
                                           const REAL *inner, const REAL *y, const REAL *z,
                                           REAL *d, REAL *m, REAL *to, const double *rates,
                                           size_t rows, NAME(Gemm) *gemm, size_t *active,
                                           double limit)
{
    unsigned long long moved = 0;
    size_t at = 0;
    for (size_t l = 0; l < n; l++)
        at += FILLED(rows * layer[l].out);
    for (size_t l = n; l-- > 0;) {
        at -= FILLED(rows * layer[l].out);
        const REAL *out = l == n - 1 ? y : inner + at;
        const REAL *in = l == 0 ? x : inner + at - FILLED(rows * layer[l - 1].out);
        REAL *message = l == 0 ? to : m;
        const double alpha = rates ? rates[2 * l] : 0, beta = rates ? rates[2 * l + 1] : 0;
        int moves = rows == 1
                        ? NAME(pull)((REAL *)layer[l].w, (REAL *)layer[l].b, in, z,
                                     layer[l].relu ? out : NULL, d + at, message, layer[l].out,
                                     layer[l].in, active, alpha, beta, limit)
                        : NAME(many_pull)(&layer[l], in, z, out, d + at, message, rows, gemm, alpha,
                                          beta, limit);
        if (moves)
            moved |= 1ULL << l;
        z = message;
    }
    return moved;
}

#undef AT
#undef OF
#undef VECTOR
#undef LANES
#undef GROUP
