/* Resizing of RGB images by torch's antialiased filter, to the bit, with the weights of two sizes arranged once.

torch computes the weights anew for every image, which takes as long as one of its two passes. Here `axis` arranges those
of one direction, and `resize` applies two of them. The arithmetic is torch's (UpSampleKernelAVXAntialias.h, after
Pillow-SIMD): first along the rows, then down the columns, weights of 16 bits, sums of 32 bits, rounded to 8 bits after
each pass. `vlm.data.transforms` reads the weights off torch itself, compares both once, and keeps torch where this is not
built, not supported by the processor, or not equal.

Needed are AVX-512 with byte permutations and 16-bit dot products (Intel since Ice Lake, AMD since Zen 4). Python's lock
is free while an image is resized. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_KERNEL 1
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))
#define INLINE static inline __attribute__((always_inline))
#endif

#define CHANNELS 3
/* bytes of a vector, and sums of 32 bits in it */
#define VECTOR 64
#define SUMS 16
/* of a pair of taps the two pixels lie in the even bytes of a sum */
#define EVEN_BYTES 0x5555555555555555ull
#define MAX_PAIRS 8
#define CAPSULE "vlm.data.antialias.axis"

/* Where the sums of a vector read in a row, in bytes; at most two vectors. */
typedef struct {
    int32_t first;
    int32_t bytes;
} Reach;

enum { NARROW, WIDE, TOO_WIDE };

/* The weights of one direction. Taps go in pairs, since a dot product adds two of 16 bits. */
typedef struct {
    int32_t size, size_out, pairs, precision, vectors;
    /* whether one vector holds what another one sums up, or two, or more than two would be needed */
    int32_t widest;
    /* for the columns: the two rows of each pair, and their weights as one number */
    int32_t *rows;    /* [size_out][pairs][2] */
    int32_t *weights; /* [size_out][pairs] */
    /* for the rows: which bytes of its reach a vector multiplies, and by what */
    Reach *reaches;   /* [vectors] */
    uint8_t *indices; /* [vectors][pairs][64] */
    int32_t *factors; /* [vectors][pairs][16] */
} Axis;

static void free_axis(Axis *axis) {
    if (axis) {
        free(axis->rows);
        free(axis->weights);
        free(axis->reaches);
        free(axis->indices);
        free(axis->factors);
        free(axis);
    }
}

static void free_capsule(PyObject *capsule) { free_axis(PyCapsule_GetPointer(capsule, CAPSULE)); }

static int at_most(int number, int limit) { return number < limit ? number : limit; }

static int32_t two_weights(const int16_t *taps, int number, int pair) {
    uint16_t first = (uint16_t)taps[2 * pair];
    uint16_t second = 2 * pair + 1 < number ? (uint16_t)taps[2 * pair + 1] : 0;
    return (int32_t)((uint32_t)second << 16 | first);
}

static void arrange_columns(Axis *axis, const int32_t *starts, const int16_t *taps, int number) {
    for (int place = 0; place < axis->size_out; place++)
        for (int pair = 0; pair < axis->pairs; pair++) {
            size_t where = (size_t)place * axis->pairs + pair;
            axis->weights[where] = two_weights(taps + (size_t)place * number, number, pair);
            /* beyond the edge the weight is 0, and any pixel serves */
            axis->rows[2 * where] = at_most(starts[place] + 2 * pair, axis->size - 1);
            axis->rows[2 * where + 1] = at_most(starts[place] + 2 * pair + 1, axis->size - 1);
        }
}

static void arrange_vector(Axis *axis, int vector, const int32_t *starts, const int16_t *taps, int number) {
    int from = vector * SUMS, to = at_most(from + SUMS, axis->size_out * CHANNELS);
    int first = axis->size, last = 0;
    for (int sum = from; sum < to; sum++) {
        int start = starts[sum / CHANNELS];
        if (start < first) first = start;
        if (start + number > last) last = start + number;
    }
    last = at_most(last, axis->size);
    int bytes = (last - first) * CHANNELS;
    int width = bytes > 2 * VECTOR ? TOO_WIDE : bytes > VECTOR ? WIDE : NARROW;
    if (width > axis->widest) axis->widest = width;
    axis->reaches[vector] = (Reach){first * CHANNELS, bytes};
    for (int pair = 0; pair < axis->pairs; pair++)
        for (int sum = from; sum < to; sum++) { /* beyond the last, index and factor stay 0 */
            int place = sum / CHANNELS, channel = sum % CHANNELS;
            size_t lane = ((size_t)vector * axis->pairs + pair) * SUMS + (sum - from);
            axis->factors[lane] = two_weights(taps + (size_t)place * number, number, pair);
            for (int side = 0; side < 2; side++) {
                int pixel = at_most(starts[place] + 2 * pair + side, last - 1);
                axis->indices[4 * lane + 2 * side] = (uint8_t)((pixel - first) * CHANNELS + channel);
            }
        }
}

/* NULL where there is no memory. number: taps of each place. */
static Axis *make_axis(const int32_t *starts, const int16_t *taps, int number, int size, int size_out, int precision) {
    Axis *axis = calloc(1, sizeof(Axis));
    if (!axis) return NULL;
    axis->size = size;
    axis->size_out = size_out;
    axis->precision = precision;
    axis->pairs = (number + 1) / 2;
    axis->vectors = (size_out * CHANNELS + SUMS - 1) / SUMS;
    axis->rows = calloc((size_t)size_out * axis->pairs * 2, sizeof(int32_t));
    axis->weights = calloc((size_t)size_out * axis->pairs, sizeof(int32_t));
    axis->reaches = calloc(axis->vectors, sizeof(Reach));
    axis->indices = calloc((size_t)axis->vectors * axis->pairs, VECTOR);
    axis->factors = calloc((size_t)axis->vectors * axis->pairs, VECTOR);
    if (axis->rows && axis->weights && axis->reaches && axis->indices && axis->factors) {
        arrange_columns(axis, starts, taps, number);
        for (int vector = 0; vector < axis->vectors; vector++) arrange_vector(axis, vector, starts, taps, number);
        return axis;
    }
    free_axis(axis);
    return NULL;
}

#ifdef HAS_KERNEL

/* The lowest bits set: as many bytes of a vector as are there. */
INLINE __mmask64 lowest(int number) { return number >= 64 ? ~0ull : number <= 0 ? 0 : (1ull << number) - 1; }

/* Along the rows: 16 sums of each row, down all rows, so that their indices and factors can stay in registers. */
AVX512 INLINE void resize_strip(const Axis *axis, int vector, int pairs, int is_wide, const uint8_t *restrict pixels,
                                Py_ssize_t stride, int rows, uint8_t *restrict out, Py_ssize_t out_stride) {
    const uint8_t *restrict indices = axis->indices + (size_t)vector * pairs * VECTOR;
    const int32_t *restrict factors = axis->factors + (size_t)vector * pairs * SUMS;
    Reach reach = axis->reaches[vector];
    __mmask64 near = lowest(reach.bytes), far = lowest(reach.bytes - VECTOR);
    __m512i round = _mm512_set1_epi32(1 << (axis->precision - 1));
    __m128i shift = _mm_cvtsi32_si128(axis->precision);
    pixels += reach.first;
    for (int row = 0; row < rows; row++, pixels += stride, out += out_stride) {
        /* masked, since a row may end within the vector, and with it the image */
        __m512i bytes = _mm512_maskz_loadu_epi8(near, pixels);
        __m512i more = is_wide ? _mm512_maskz_loadu_epi8(far, pixels + VECTOR) : bytes;
        __m512i sums = round;
        for (int pair = 0; pair < pairs; pair++) {
            __m512i index = _mm512_loadu_si512(indices + pair * VECTOR);
            __m512i factor = _mm512_loadu_si512(factors + pair * SUMS);
            __m512i chosen = is_wide ? _mm512_maskz_permutex2var_epi8(EVEN_BYTES, bytes, index, more)
                                     : _mm512_maskz_permutexvar_epi8(EVEN_BYTES, index, bytes);
            sums = _mm512_dpwssd_epi32(sums, chosen, factor);
        }
        sums = _mm512_max_epi32(_mm512_sra_epi32(sums, shift), _mm512_setzero_si512());
        /* all 16, since rows are as long as their vectors; a masked store takes several times as long */
        _mm_storeu_si128((__m128i *)out, _mm512_cvtusepi32_epi8(sums));
    }
}

AVX512 static void resize_rows(const Axis *axis, const uint8_t *pixels, Py_ssize_t stride, int rows, uint8_t *out,
                               Py_ssize_t out_stride) {
    for (int vector = 0; vector < axis->vectors; vector++, out += SUMS) {
        /* with a fixed number of pairs their loop is unrolled: two where images are enlarged, else up to ceil(2 scale) */
        if (axis->widest == NARROW && axis->pairs == 2)
            resize_strip(axis, vector, 2, 0, pixels, stride, rows, out, out_stride);
        else if (axis->widest == NARROW && axis->pairs == 3)
            resize_strip(axis, vector, 3, 0, pixels, stride, rows, out, out_stride);
        else if (axis->widest == NARROW && axis->pairs == 4)
            resize_strip(axis, vector, 4, 0, pixels, stride, rows, out, out_stride);
        else if (axis->widest == NARROW)
            resize_strip(axis, vector, axis->pairs, 0, pixels, stride, rows, out, out_stride);
        else
            resize_strip(axis, vector, axis->pairs, 1, pixels, stride, rows, out, out_stride);
    }
}

/* Down the columns: one row of the result, of the rows that it sums up; two are multiplied at once. */
AVX512 INLINE void resize_row(const Axis *axis, int place, int pairs, const uint8_t *restrict pixels,
                              Py_ssize_t stride, int bytes, uint8_t *restrict out) {
    __m512i zero = _mm512_setzero_si512();
    __m512i round = _mm512_set1_epi32(1 << (axis->precision - 1));
    __m128i shift = _mm_cvtsi32_si128(axis->precision);
    const int32_t *restrict rows = axis->rows + (size_t)place * pairs * 2;
    const int32_t *restrict weights = axis->weights + (size_t)place * pairs;
    for (int column = 0; column < bytes; column += VECTOR) {
        __m512i sums[4] = {round, round, round, round};
        for (int pair = 0; pair < pairs; pair++) {
            __m512i above = _mm512_loadu_si512(pixels + rows[2 * pair] * stride + column);
            __m512i below = _mm512_loadu_si512(pixels + rows[2 * pair + 1] * stride + column);
            __m512i weight = _mm512_set1_epi32(weights[pair]);
            __m512i low = _mm512_unpacklo_epi8(above, below), high = _mm512_unpackhi_epi8(above, below);
            sums[0] = _mm512_dpwssd_epi32(sums[0], _mm512_unpacklo_epi8(low, zero), weight);
            sums[1] = _mm512_dpwssd_epi32(sums[1], _mm512_unpackhi_epi8(low, zero), weight);
            sums[2] = _mm512_dpwssd_epi32(sums[2], _mm512_unpacklo_epi8(high, zero), weight);
            sums[3] = _mm512_dpwssd_epi32(sums[3], _mm512_unpackhi_epi8(high, zero), weight);
        }
        for (int part = 0; part < 4; part++) sums[part] = _mm512_sra_epi32(sums[part], shift);
        /* packing undoes the order of unpacking, and clips to bytes */
        __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(sums[0], sums[1]), _mm512_packs_epi32(sums[2], sums[3]));
        if (bytes - column >= VECTOR)
            _mm512_storeu_si512(out + column, packed);
        else
            _mm512_mask_storeu_epi8(out + column, lowest(bytes - column), packed);
    }
}

AVX512 static void resize_columns(const Axis *axis, const uint8_t *pixels, Py_ssize_t stride, int bytes, uint8_t *out,
                                  Py_ssize_t out_stride) {
    for (int place = 0; place < axis->size_out; place++, out += out_stride) {
        if (axis->pairs == 2)
            resize_row(axis, place, 2, pixels, stride, bytes, out);
        else if (axis->pairs == 3)
            resize_row(axis, place, 3, pixels, stride, bytes, out);
        else if (axis->pairs == 4)
            resize_row(axis, place, 4, pixels, stride, bytes, out);
        else
            resize_row(axis, place, axis->pairs, pixels, stride, bytes, out);
    }
}

static int is_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vnni");
}

#else

static void resize_rows(const Axis *axis, const uint8_t *pixels, Py_ssize_t stride, int rows, uint8_t *out,
                        Py_ssize_t out_stride) {}
static void resize_columns(const Axis *axis, const uint8_t *pixels, Py_ssize_t stride, int bytes, uint8_t *out,
                           Py_ssize_t out_stride) {}
static int is_supported(void) { return 0; }

#endif

static PyObject *call_is_supported(PyObject *module, PyObject *none) { return PyBool_FromLong(is_supported()); }

static PyObject *axis_of(const Py_buffer *starts, const Py_buffer *taps, int size, int precision) {
    Py_ssize_t size_out = starts->len / (Py_ssize_t)sizeof(int32_t);
    Py_ssize_t number = size_out ? taps->len / (Py_ssize_t)sizeof(int16_t) / size_out : 0;
    int is_valid = size > 0 && precision > 0 && precision < 31 && number > 0 && size_out < 1 << 20;
    for (Py_ssize_t place = 0; is_valid && place < size_out; place++) {
        int32_t start = ((const int32_t *)starts->buf)[place];
        is_valid = start >= 0 && start < size;
    }
    if (!is_valid) {
        PyErr_SetString(PyExc_ValueError, "each place needs taps, and begins in the image");
        return NULL;
    }
    if (number > 2 * MAX_PAIRS) return Py_NewRef(Py_None);
    Axis *axis = make_axis(starts->buf, taps->buf, (int)number, size, (int)size_out, precision);
    if (!axis) return PyErr_NoMemory();
    PyObject *capsule = PyCapsule_New(axis, CAPSULE, free_capsule);
    if (!capsule) free_axis(axis);
    return capsule;
}

static PyObject *call_axis(PyObject *module, PyObject *arguments) {
    Py_buffer starts, taps;
    int size, precision;
    if (!PyArg_ParseTuple(arguments, "y*y*ii", &starts, &taps, &size, &precision)) return NULL;
    PyObject *axis = axis_of(&starts, &taps, size, precision);
    PyBuffer_Release(&starts);
    PyBuffer_Release(&taps);
    return axis;
}

static int fits(const Py_buffer *image, int height, int width) {
    return image->ndim == 3 && image->itemsize == 1 && image->shape[0] == height && image->shape[1] == width &&
           image->shape[2] == CHANNELS && image->strides[2] == 1 && image->strides[1] == CHANNELS;
}

/* Whether it is done: not where the axis reaches too far for a row, or pixels do not lie one after the other. */
static PyObject *resize(const Py_buffer *pixels, Py_buffer *out, const Axis *across, const Axis *down) {
    if (!is_supported() || across->widest == TOO_WIDE || !fits(pixels, down->size, across->size) ||
        !fits(out, down->size_out, across->size_out))
        return Py_NewRef(Py_False);
    Py_ssize_t stride = ((Py_ssize_t)across->vectors * SUMS + VECTOR - 1) / VECTOR * VECTOR;
    uint8_t *between = malloc((size_t)stride * down->size);
    if (!between) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    resize_rows(across, pixels->buf, pixels->strides[0], down->size, between, stride);
    resize_columns(down, between, stride, across->size_out * CHANNELS, out->buf, out->strides[0]);
    Py_END_ALLOW_THREADS
    free(between);
    return Py_NewRef(Py_True);
}

static PyObject *call_resize(PyObject *module, PyObject *arguments) {
    PyObject *source, *target, *across_capsule, *down_capsule;
    if (!PyArg_ParseTuple(arguments, "OOOO", &source, &target, &across_capsule, &down_capsule)) return NULL;
    const Axis *across = PyCapsule_GetPointer(across_capsule, CAPSULE);
    const Axis *down = across ? PyCapsule_GetPointer(down_capsule, CAPSULE) : NULL;
    Py_buffer pixels, out;
    if (!down || PyObject_GetBuffer(source, &pixels, PyBUF_STRIDES)) return NULL;
    PyObject *is_done = NULL;
    if (!PyObject_GetBuffer(target, &out, PyBUF_STRIDES | PyBUF_WRITABLE)) {
        is_done = resize(&pixels, &out, across, down);
        PyBuffer_Release(&out);
    }
    PyBuffer_Release(&pixels);
    return is_done;
}

static PyMethodDef METHODS[] = {
    {"is_supported", call_is_supported, METH_NOARGS, "Whether the processor has what resizing needs."},
    {"axis", call_axis, METH_VARARGS, "Arrange the taps of one direction; None where there are too many."},
    {"resize", call_resize, METH_VARARGS, "Write an image to another by two axes; False where it cannot be done here."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "antialias", "torch's antialiased resizing.", 0, METHODS,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_antialias(void) { return PyModule_Create(&MODULE); }
