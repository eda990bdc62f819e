/* Rotations of vectors, and their 4-bit form, for one type (REAL), with names made by NAME:

       R x = H (s x)             s: random signs;  H: Walsh-Hadamard of m numbers, over sqrt(m)
       R^T x = s (H x)           m: the largest power of two up to n; if m < n the transform of the
                                 last m numbers follows (in R^T precedes) that of the first m
       Q Q^T x = R^T (k (R x))   k: ones and zeros, the numbers kept
       4 bits: y = R x, scale = max |y| / 7 in bfloat16, q = round(y / scale) + 8, two in a byte

   Sums have one order, as in rows.h. See dynamics/modules/subspace.py and runtime/signals/codes.py. */

/* Included by rows.h, whose vectors it uses. */

static REAL NAME(signs_of)[LANES * LANES]; /* Walsh-Hadamard of LANES numbers, without a scale */

static void NAME(fill_signs)(void)
{
    for (int i = 0; i < LANES * LANES; i++)
        NAME(signs_of)[i] = __builtin_popcount((unsigned)(i / LANES & i % LANES)) % 2 ? -1 : 1;
}

/* x = H x, of m numbers, a power of two: within vectors by a product with the small matrix, GROUP
   vectors at a time, and then by sums and differences of vectors. */
static inline __attribute__((always_inline)) void NAME(hadamard)(REAL *x, size_t m)
{
    const REAL scale = (REAL)(1 / sqrt((double)m));
    if (m < GROUP * LANES) {
        for (size_t h = 1; h < m; h *= 2)
            for (size_t i = 0; i < m; i++)
                if (!(i & h)) {
                    REAL a = x[i], b = x[i + h];
                    x[i] = a + b;
                    x[i + h] = a - b;
                }
        for (size_t i = 0; i < m; i++)
            x[i] *= scale;
        return;
    }
    for (size_t i = 0; i < m; i += GROUP * LANES) {
        VECTOR sum[GROUP];
        for (int g = 0; g < GROUP; g++)
            sum[g] = (VECTOR){0};
        for (int k = 0; k < LANES; k++)
            for (int g = 0; g < GROUP; g++)
                sum[g] += x[i + g * LANES + k] * OF(NAME(signs_of) + k * LANES);
        for (int g = 0; g < GROUP; g++)
            AT(x + i + g * LANES) = sum[g] * scale;
    }
    for (size_t h = LANES; h < m; h *= 2)
        for (size_t i = 0; i < m; i += 2 * h)
            for (size_t j = i; j < i + h; j += LANES) {
                VECTOR a = OF(x + j), b = OF(x + j + h);
                AT(x + j) = a + b;
                AT(x + j + h) = a - b;
            }
}

static inline __attribute__((always_inline)) void NAME(turn)(REAL *x, const REAL *signs, size_t n,
                                                             size_t m)
{
    for (size_t i = 0; i < n; i++)
        x[i] *= signs[i];
    NAME(hadamard)(x, m);
    if (m < n)
        NAME(hadamard)(x + n - m, m);
}

static inline __attribute__((always_inline)) void NAME(turn_back)(REAL *x, const REAL *signs,
                                                                  size_t n, size_t m)
{
    if (m < n)
        NAME(hadamard)(x + n - m, m);
    NAME(hadamard)(x, m);
    for (size_t i = 0; i < n; i++)
        x[i] *= signs[i];
}

/* R x to y; back: R^T x. y may be x. */
CLONES static void NAME(rotate)(const REAL *x, const REAL *signs, REAL *y, size_t rows, size_t n,
                                int back)
{
    const size_t m = largest_power(n);
    for (size_t r = 0; r < rows; r++, x += n, y += n) {
        if (y != x)
            memcpy(y, x, n * sizeof(REAL));
        if (back)
            NAME(turn_back)(y, signs, n, m);
        else
            NAME(turn)(y, signs, n, m);
    }
}

/* Q Q^T x to y, which may be x. table: the signs, and what is kept. */
CLONES static void NAME(project)(const REAL *x, const REAL *table, REAL *y, size_t rows, size_t n)
{
    const size_t m = largest_power(n);
    const REAL *kept = table + n;
    for (size_t r = 0; r < rows; r++, x += n, y += n) {
        if (y != x)
            memcpy(y, x, n * sizeof(REAL));
        NAME(turn)(y, table, n, m);
        for (size_t i = 0; i < n; i++)
            y[i] *= kept[i];
        NAME(turn_back)(y, table, n, m);
    }
}

/* Returns 0 where a scale is not finite. room: n + 1 numbers. */
CLONES static int NAME(to_nibbles)(const REAL *x, const REAL *signs, uint8_t *sent, REAL *room,
                                   size_t rows, size_t n)
{
    const size_t m = largest_power(n), pairs = (n + 1) / 2;
    const REAL round_to = (REAL)(1.5 * (sizeof(REAL) == 4 ? 8388608.0 : 4503599627370496.0));
    for (size_t r = 0; r < rows; r++, x += n, sent += pairs + 2) {
        REAL most = 0, odd = 0;
        memcpy(room, x, n * sizeof(REAL));
        NAME(turn)(room, signs, n, m);
        for (size_t i = 0; i < n; i++) {
            REAL size = room[i] < 0 ? -room[i] : room[i];
            most = size > most ? size : most;
            odd += size * 0; /* (not zero for what is not finite) */
        }
        uint16_t code = to_bfloat16((float)(most / 7));
        REAL scale = (REAL)from_bfloat16(code);
        if (odd != 0 || (code & 0x7f80) == 0x7f80)
            return 0;
        if (scale == 0)
            scale = 1;
        room[n] = 0;
        for (size_t i = 0; i < n; i++) {
            REAL q = room[i] / scale;
            q = q < -7 ? -7 : q;
            q = q > 7 ? 7 : q;
            room[i] = (q + round_to) - round_to + 8;
        }
        for (size_t i = 0; i < pairs; i++)
            sent[i] = (uint8_t)((int)room[2 * i] | (int)room[2 * i + 1] << 4);
        memcpy(sent + pairs, &code, 2);
    }
    return 1;
}

CLONES static void NAME(from_nibbles)(const uint8_t *sent, const REAL *signs, REAL *y, size_t rows,
                                      size_t n)
{
    const size_t m = largest_power(n), pairs = (n + 1) / 2;
    for (size_t r = 0; r < rows; r++, y += n, sent += pairs + 2) {
        uint16_t code;
        memcpy(&code, sent + pairs, 2);
        const REAL scale = (REAL)from_bfloat16(code);
        for (size_t i = 0; i < n / 2; i++) {
            y[2 * i] = (REAL)((sent[i] & 15) - 8) * scale;
            y[2 * i + 1] = (REAL)((sent[i] >> 4) - 8) * scale;
        }
        if (n % 2)
            y[n - 1] = (REAL)((sent[n / 2] & 15) - 8) * scale;
        NAME(turn_back)(y, signs, n, m);
    }
}
