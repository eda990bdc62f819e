/* Convolutions of images by the products of products.h, which includes this: for one type and width of
   vectors, with names made by NAME.

   For one image, with output channels o, and k = (c, i, j) over input channels and places of the kernel:

       forward   y[o, p] = sum over k of W[o, k] x[k, p] + b[o]
       pull      g_W[o, k] = sum over p of z[o, p] x[k, p],   g_b[o] = sum over p of z[o, p]
                 m[c, q] = sum over o, i, j of W[o, k] z[o, q - (i, j)]

   No x[k, p] is made. An image is split into planes, one for every channel and remainder of row and
   column by the stride: then x[k, .] is a stretch of a plane, from a place on that belongs to k. It
   goes over all outputs row by row, and where a row ends over what is beside the image; these sums
   are made and thrown away, and z is 0 there.

   at[k]: where x[k, .] begins. A plane has `wide` numbers a row, `plane` in all; outputs take `span`. */

#ifndef CONVOLUTION_H
#define CONVOLUTION_H
enum { LONG = 256 }; /* so many numbers a sum of a gradient has at least, over images, if it can */

/* Sizes, and (but for images, channels and outputs) by row and column. out: of an output. */
typedef struct {
    size_t images, channels, outputs, size[2], kernel[2], stride[2], padding[2], dilation[2], out[2];
} Convolution;

/* steps: planes of a channel; kernel: places of the kernel; before: how far the last of these lies
   behind the first; all: numbers of an image's planes; group: images of one sum of a gradient. */
typedef struct {
    size_t steps, kernel, wide, plane, span, before, all, group;
} Planes;

static Planes planes_of(const Convolution *c)
{
    Planes p;
    size_t down = (c->kernel[0] - 1) * c->dilation[0] / c->stride[0];
    size_t right = (c->kernel[1] - 1) * c->dilation[1] / c->stride[1];
    p.steps = c->stride[0] * c->stride[1];
    p.kernel = c->kernel[0] * c->kernel[1];
    p.wide = c->out[1] + right;
    p.plane = (c->out[0] + down) * p.wide;
    p.span = (c->out[0] - 1) * p.wide + c->out[1];
    p.before = down * p.wide + right;
    p.all = p.steps * c->channels * p.plane + p.span; /* (and ones, whose sums with z are g_b) */
    p.group = (LONG + p.span - 1) / p.span;
    p.group = p.group < c->images ? p.group : c->images;
    return p;
}

/* The plane of the place (i, j) of a kernel, and how far it lies behind that plane's first number. */
static size_t place_of(const Convolution *c, const Planes *p, size_t ij, size_t *behind)
{
    size_t row = ij / c->kernel[1] * c->dilation[0], column = ij % c->kernel[1] * c->dilation[1];
    *behind = row / c->stride[0] * p->wide + column / c->stride[1];
    return row % c->stride[0] * c->stride[1] + column % c->stride[1];
}

static size_t places_in(const Convolution *c, const Planes *p, size_t plane)
{
    size_t n = 0, behind;
    for (size_t ij = 0; ij < p->kernel; ij++)
        n += place_of(c, p, ij, &behind) == plane;
    return n;
}

/* Where x[k, .] begins, and the ones. */
static void place_inputs(const Convolution *c, const Planes *p, size_t *at)
{
    const size_t many = c->channels * p->kernel;
    for (size_t k = 0; k < many; k++) {
        size_t behind, plane = place_of(c, p, k % p->kernel, &behind);
        at[k] = (plane * c->channels + k / p->kernel) * p->plane + behind;
    }
    at[many] = p->all - p->span;
}

/* The numbers of room that a pass needs, forward or back. */
static size_t convolution_room(const Convolution *c, int back)
{
    Planes p = planes_of(c);
    size_t k = c->channels * p.kernel;
    if (!back)
        return p.all + c->outputs * p.span;
    return p.group * (p.all + c->outputs * p.span) + c->outputs * (p.plane + p.before + 2 * k + 1) +
           c->stride[1] * p.wide + 32; /* (whole vectors of a line) */
}
#endif

/* Lanes of two vectors: every second one; those of both in turn, the first or the second half. */
typedef INT NAME(Lanes) __attribute__((vector_size(VECTOR_BITS / 8)));
#if WIDE == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif WIDE == 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define EVEN 0, 2, 4, 6
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif
#ifdef __clang__
#define LANES_OF(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LANES_OF(a, b, ...) __builtin_shuffle(a, b, (NAME(Lanes)){__VA_ARGS__})
#endif

/* Does a piece of work on `left` numbers from i on, for all i in steps of a vector. */
#define ROW_OF(n, ...)                                                                             \
    for (size_t i = 0; i < (n); i += WIDE) {                                                       \
        const size_t left = (n) - i < WIDE ? (n) - i : WIDE;                                       \
        __VA_ARGS__;                                                                               \
    }

TILE void NAME(copied)(const REAL *from, REAL *to, size_t n)
{
    ROW_OF(n, STORE_PART(to + i, left, LOAD_PART(left, from + i)))
}

/* to[i] = from[step i]. */
TILE void NAME(spread)(const REAL *from, REAL *to, size_t n, size_t step)
{
    if (step == 1) {
        NAME(copied)(from, to, n);
    } else if (step == 2) {
        ROW_OF(n, {
            const size_t many = 2 * left - 1;
            NAME(Wide) a = LOAD_PART(many < WIDE ? many : WIDE, from + 2 * i);
            NAME(Wide) b = many > WIDE ? LOAD_PART(many - WIDE, from + 2 * i + WIDE) : ZERO;
            STORE_PART(to + i, left, LANES_OF(a, b, EVEN));
        })
    } else {
        for (size_t i = 0; i < n; i++)
            to[i] = from[step * i];
    }
}

/* From an image to its planes; what these have beside the image stays as it is. */
PRODUCTS static void NAME(split)(const Convolution *c, const Planes *p, const REAL *image,
                                 REAL *planes)
{
    const size_t step = c->stride[1], high = p->plane / p->wide, of_x = c->size[0] * c->size[1];
    for (size_t row = 0; row < c->size[0]; row++)
        for (size_t j = 0; j < step; j++) {
            const size_t at = row + c->padding[0], first = (j + step - c->padding[1] % step) % step;
            const size_t column = (first + c->padding[1]) / step, down = at / c->stride[0];
            const size_t plane = (at % c->stride[0] * step + j) * c->channels;
            size_t n = first < c->size[1] ? (c->size[1] - first + step - 1) / step : 0;
            if (down >= high || column >= p->wide)
                continue;
            n = n < p->wide - column ? n : p->wide - column;
            const REAL *from = image + row * c->size[1] + first;
            REAL *to = planes + plane * p->plane + down * p->wide + column;
            for (size_t i = 0; i < c->channels; i++)
                NAME(spread)(from + i * of_x, to + i * p->plane, n, step);
        }
}

/* From planes back to an image: 0 where no plane has its number. line: room for a row's padding, too. */
PRODUCTS static void NAME(joined)(const Convolution *c, const Planes *p, const REAL *planes,
                                  REAL *image, REAL *line)
{
    const size_t step = c->stride[1], high = p->plane / p->wide, many = step * p->wide;
    const size_t there = many < c->padding[1] ? 0 : many - c->padding[1];
    const size_t n = there < c->size[1] ? there : c->size[1], apart = c->channels * p->plane;
    for (size_t row = 0; row < c->size[0]; row++) {
        const size_t at = row + c->padding[0], down = at / c->stride[0];
        const REAL *from = planes + at % c->stride[0] * step * apart + down * p->wide;
        REAL *to = image + row * c->size[1];
        for (size_t channel = 0; channel < c->channels; channel++) {
            if (down >= high || n < c->size[1])
                memset(to, 0, c->size[1] * sizeof(REAL));
            if (down < high && step == 2) {
                ROW_OF(p->wide, {
                    NAME(Wide) a = LOAD_PART(left, from + i), b = LOAD_PART(left, from + apart + i);
                    STORE(line + 2 * i, LANES_OF(a, b, LOW));
                    STORE(line + 2 * i + WIDE, LANES_OF(a, b, HIGH));
                })
            } else if (down < high && step > 2) {
                for (size_t j = 0; j < step; j++)
                    for (size_t i = 0; i < p->wide; i++)
                        line[step * i + j] = from[j * apart + i];
            }
            if (down < high)
                NAME(copied)((step == 1 ? from : line) + c->padding[1], to, n);
            from += p->plane;
            to += c->size[0] * c->size[1];
        }
    }
}

/* z of one image in rows of planes; those of an output are so many numbers apart. */
PRODUCTS static void NAME(put_rows)(const Convolution *c, const Planes *p, const REAL *z, REAL *to,
                                    size_t apart)
{
    for (size_t o = 0; o < c->outputs; o++)
        for (size_t row = 0; row < c->out[0]; row++, z += c->out[1])
            NAME(copied)(z, to + o * apart + row * p->wide, c->out[1]);
}

/* at: room for K + 1 places. */
PRODUCTS static void NAME(convolve)(const Convolution *c, const REAL *x, const REAL *w, const REAL *b,
                                    REAL *y, REAL *room, size_t *at)
{
    const Planes p = planes_of(c);
    REAL *sums = room + p.all;
    place_inputs(c, &p, at);
    memset(room, 0, p.all * sizeof(REAL));
    for (size_t image = 0; image < c->images; image++, x += c->channels * c->size[0] * c->size[1]) {
        NAME(split)(c, &p, x, room);
        NAME(placed_messages)(w, room, at, sums, c->outputs, p.span, c->channels * p.kernel);
        for (size_t o = 0; o < c->outputs; o++) {
            const NAME(Wide) bias = ALL(b ? b[o] : 0);
            for (size_t row = 0; row < c->out[0]; row++, y += c->out[1]) {
                const REAL *from = sums + o * p.span + row * p.wide;
                ROW_OF(c->out[1],
                       STORE_PART(y + i, left, MM(add)(LOAD_PART(left, from + i), bias)))
            }
        }
    }
}

/* g: gradients of W and, behind each of its rows, of b, (O, K + 1); NULL where they are not wanted. to:
   likewise the message. at: room for max(O, C) times the kernel's places, and 1. */
PRODUCTS static void NAME(convolve_back)(const Convolution *c, const REAL *x, const REAL *w,
                                         const REAL *z, REAL *g, REAL *to, REAL *room, size_t *at)
{
    const Planes p = planes_of(c);
    const size_t k = c->channels * p.kernel, apart = p.plane + p.before, many = c->outputs * (k + 1);
    const size_t of_x = c->channels * c->size[0] * c->size[1], of_z = c->outputs * p.span;
    const size_t of_y = c->outputs * c->out[0] * c->out[1];
    REAL *rows = room + p.group * p.all, *padded = rows + p.group * of_z;
    REAL *part = padded + c->outputs * apart, *turned = part + many, *line = turned + c->outputs * k;
    memset(room, 0, (size_t)(part - room) * sizeof(REAL));
    place_inputs(c, &p, at);
    for (size_t n = 0; n < p.group; n++)
        for (size_t i = 0; i < p.span; i++)
            room[n * p.all + at[k] + i] = 1;
    for (size_t image = 0; g && image < c->images; image += p.group) {
        const size_t n = c->images - image < p.group ? c->images - image : p.group;
        for (size_t i = image; i < image + n; i++) {
            NAME(put_rows)(c, &p, z + i * of_y, rows + (i - image) * of_z, p.span);
            NAME(split)(c, &p, x + i * of_x, room + (i - image) * p.all);
        }
        NAME(placed_outputs)(rows, room, at, image ? part : g, c->outputs, p.span, k + 1, n, of_z, p.all);
        if (image)
            ROW_OF(many, STORE_PART(g + i, left,
                                    MM(add)(LOAD_PART(left, g + i), LOAD_PART(left, part + i))))
    }
    if (to == NULL)
        return;
    for (size_t plane = 0, done = 0; plane < p.steps; plane++) { /* W, turned: (C, o, i, j) */
        const size_t places = places_in(c, &p, plane), n = places * c->outputs;
        for (size_t ij = 0, next = 0, behind; ij < p.kernel; ij++) {
            if (place_of(c, &p, ij, &behind) != plane)
                continue;
            REAL *to_w = turned + c->channels * done + next;
            for (size_t o = 0; o < c->outputs; o++) {
                at[done + o * places + next] = o * apart + p.before - behind;
                for (size_t channel = 0; channel < c->channels; channel++)
                    to_w[channel * n + o * places] = w[o * k + channel * p.kernel + ij];
            }
            next++;
        }
        done += n;
    }
    for (size_t image = 0; image < c->images; image++) {
        NAME(put_rows)(c, &p, z + image * of_y, padded + p.before, apart);
        for (size_t plane = 0, done = 0; plane < p.steps; plane++) {
            const size_t n = places_in(c, &p, plane) * c->outputs;
            NAME(placed_messages)(turned + c->channels * done, padded, at + done,
                                  room + plane * c->channels * p.plane, c->channels, p.plane, n);
            done += n;
        }
        NAME(joined)(c, &p, room, to + image * of_x, line);
    }
}
#undef ROW_OF
#undef LANES_OF
#undef HIGH
#undef LOW
#undef EVEN
