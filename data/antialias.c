/* Resizing of RGB images by torch's antialiased filter, to the bit, with the weights of two sizes arranged once.

torch computes the weights anew for every image, which takes as long as one of its two passes. Here `axis` arranges those
of one direction, and `resize` applies two of them. The arithmetic is torch's (UpSampleKernelAVXAntialias.h, after
Pillow-SIMD): first along the rows, then down the columns, weights of 16 bits, sums of 32 bits, rounded to 8 bits after
each pass. `vlm.data.transforms` reads the weights off torch itself, compares both once, and keeps torch where this is not
built, not supported by the processor, or not equal.

There are two ways: by AVX-512 with byte permutations and 16-bit dot products (Intel since Ice Lake, AMD since Zen 4), and
by AVX2. Python's lock is free while an image is resized. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_KERNEL 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))
#define INLINE static inline __attribute__((always_inline))
#endif

#define CHANNELS 3
/* bytes that rows between the passes are a multiple of */
#define LINE 64
/* of a pair of taps the two pixels lie in the even bytes of a sum, whose other bytes are 0 */
#define EVEN_BYTES 0x5555555555555555ull
#define NO_BYTE 0x80
#define MAX_PAIRS 8
/* of an image in one direction, so that its bytes are counted in 32 bits */
#define MAX_PIXELS (1 << 28)
#define CAPSULE "vlm.data.antialias.axis"

/* Where a group of sums reads a pair of taps in a row, in bytes. */
typedef struct {
    int32_t first;
    int32_t bytes;
} Window;

/* The weights of one direction. Taps go in pairs, since a product adds two of 16 bits. */
typedef struct {
    int32_t size, size_out, pairs, precision;
    /* for the columns: the two rows of each pair, and their weights as one number */
    int32_t *rows;    /* [size_out][pairs][2] */
    int32_t *weights; /* [size_out][pairs] */
    /* for the rows: sums of 32 bits go in groups of 16 or 4, whose bytes are permuted within a window of 64 or 16 */
    int32_t bits, sums, groups, is_too_wide;
    Window *windows;  /* [pairs][groups] */
    uint8_t *indices; /* [pairs][groups][4 * sums] */
    int32_t *factors; /* [pairs][groups][sums] */
} Axis;

static void free_axis(Axis *axis) {
    if (axis) {
        free(axis->rows);
        free(axis->weights);
        free(axis->windows);
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

/* What a group multiplies of a pair of taps: by what, and where in a row it stands. */
static void arrange_group(Axis *axis, int group, int pair, const int32_t *starts, const int16_t *taps, int number) {
    int from = group * axis->sums, to = at_most(from + axis->sums, axis->size_out * CHANNELS);
    int edge = axis->size - 1, first = edge, last = 0;
    for (int sum = from; sum < to; sum++) {
        int pixel = starts[sum / CHANNELS] + 2 * pair;
        first = at_most(first, pixel);
        last = pixel + 1 > last ? at_most(pixel + 1, edge) : last;
    }
    int window = 4 * axis->sums, beginning = first * CHANNELS;
    /* AVX2 cannot leave out what lies beyond the end of a row, so its window begins earlier */
    if (axis->bits == 256) beginning = at_most(beginning, axis->size * CHANNELS - window);
    size_t where = (size_t)pair * axis->groups + group;
    axis->windows[where] = (Window){beginning, (last + 1) * CHANNELS - beginning};
    if (beginning < 0 || axis->windows[where].bytes > window) {
        axis->is_too_wide = 1;
        return;
    }
    memset(axis->indices + where * window, NO_BYTE, window);
    for (int sum = from; sum < to; sum++) { /* beyond the last, factors stay 0 */
        int place = sum / CHANNELS, channel = sum % CHANNELS;
        size_t lane = where * axis->sums + (sum - from);
        axis->factors[lane] = two_weights(taps + (size_t)place * number, number, pair);
        for (int side = 0; side < 2; side++) {
            int pixel = at_most(starts[place] + 2 * pair + side, edge);
            axis->indices[4 * lane + 2 * side] = (uint8_t)(pixel * CHANNELS + channel - beginning);
        }
    }
}

/* NULL where there is no memory. number: taps of each place. bits: of a vector. */
static Axis *make_axis(const int32_t *starts, const int16_t *taps, int number, int size, int size_out, int precision,
                       int bits) {
    Axis *axis = calloc(1, sizeof(Axis));
    if (!axis) return NULL;
    axis->size = size;
    axis->size_out = size_out;
    axis->precision = precision;
    axis->pairs = (number + 1) / 2;
    axis->bits = bits;
    axis->sums = bits == 512 ? 16 : 4;
    /* an even number, since a vector of AVX2 is two groups */
    axis->groups = (size_out * CHANNELS + 2 * axis->sums - 1) / (2 * axis->sums) * 2;
    size_t places = (size_t)size_out * axis->pairs, windows = (size_t)axis->groups * axis->pairs;
    axis->rows = calloc(places * 2, sizeof(int32_t));
    axis->weights = calloc(places, sizeof(int32_t));
    axis->windows = calloc(windows, sizeof(Window));
    axis->indices = calloc(windows * axis->sums, sizeof(int32_t));
    axis->factors = calloc(windows * axis->sums, sizeof(int32_t));
    if (axis->rows && axis->weights && axis->windows && axis->indices && axis->factors) {
        arrange_columns(axis, starts, taps, number);
        for (int group = 0; group * axis->sums < size_out * CHANNELS; group++)
            for (int pair = 0; pair < axis->pairs; pair++) arrange_group(axis, group, pair, starts, taps, number);
        return axis;
    }
    free_axis(axis);
    return NULL;
}

#ifdef HAS_KERNEL

/* The lowest bits set: as many bytes of a vector as are there. */
INLINE __mmask64 lowest(int number) { return number >= 64 ? ~0ull : number <= 0 ? 0 : (1ull << number) - 1; }

/* Along the rows: 16 sums of each row, down all rows, so that their indices and factors can stay in registers. */
AVX512 INLINE void resize_strip_512(const Axis *axis, int group, int pairs, const uint8_t *restrict pixels,
                                    Py_ssize_t stride, int rows, uint8_t *restrict out, Py_ssize_t out_stride) {
    __m512i round = _mm512_set1_epi32(1 << (axis->precision - 1));
    __m128i shift = _mm_cvtsi32_si128(axis->precision);
    const Window *restrict windows = axis->windows + group;
    const uint8_t *restrict indices = axis->indices + (size_t)group * 64;
    const int32_t *restrict factors = axis->factors + (size_t)group * 16;
    size_t groups = axis->groups;
    __mmask64 kept[MAX_PAIRS];
    Py_ssize_t firsts[MAX_PAIRS];
    for (int pair = 0; pair < pairs; pair++) {
        /* a row may end within the vector, and with it the image */
        kept[pair] = lowest(windows[pair * groups].bytes);
        firsts[pair] = windows[pair * groups].first;
    }
    for (int row = 0; row < rows; row++, pixels += stride, out += out_stride) {
        __m512i sums = round;
        for (int pair = 0; pair < pairs; pair++) {
            size_t where = pair * groups;
            __m512i bytes = _mm512_maskz_loadu_epi8(kept[pair], pixels + firsts[pair]);
            __m512i index = _mm512_loadu_si512(indices + where * 64);
            __m512i chosen = _mm512_maskz_permutexvar_epi8(EVEN_BYTES, index, bytes);
            sums = _mm512_dpwssd_epi32(sums, chosen, _mm512_loadu_si512(factors + where * 16));
        }
        sums = _mm512_max_epi32(_mm512_sra_epi32(sums, shift), _mm512_setzero_si512());
        /* all 16, since rows are as long as their groups; a masked store takes several times as long */
        _mm_storeu_si128((__m128i *)out, _mm512_cvtusepi32_epi8(sums));
    }
}

/* As above: two groups of 4 sums. */
AVX2 INLINE void resize_strip_256(const Axis *axis, int group, int pairs, const uint8_t *restrict pixels,
                                  Py_ssize_t stride, int rows, uint8_t *restrict out, Py_ssize_t out_stride) {
    __m256i round = _mm256_set1_epi32(1 << (axis->precision - 1));
    __m128i shift = _mm_cvtsi32_si128(axis->precision);
    const Window *restrict windows = axis->windows + group;
    const uint8_t *restrict indices = axis->indices + (size_t)group * 16;
    const int32_t *restrict factors = axis->factors + (size_t)group * 4;
    size_t groups = axis->groups;
    for (int row = 0; row < rows; row++, pixels += stride, out += out_stride) {
        __m256i sums = round;
        for (int pair = 0; pair < pairs; pair++) {
            size_t where = pair * groups;
            __m128i low = _mm_loadu_si128((const __m128i *)(pixels + windows[where].first));
            __m128i high = _mm_loadu_si128((const __m128i *)(pixels + windows[where + 1].first));
            __m256i index = _mm256_loadu_si256((const __m256i *)(indices + where * 16));
            __m256i factor = _mm256_loadu_si256((const __m256i *)(factors + where * 4));
            __m256i chosen = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), index);
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(chosen, factor));
        }
        sums = _mm256_sra_epi32(sums, shift);
        sums = _mm256_packus_epi16(_mm256_packs_epi32(sums, sums), sums);
        __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        _mm_storel_epi64((__m128i *)out, bytes);
    }
}

AVX512 static void resize_rows_512(const Axis *axis, const uint8_t *pixels, Py_ssize_t stride, int rows, uint8_t *out,
                                   Py_ssize_t out_stride) {
    for (int group = 0; group < axis->groups; group++, out += 16) {
        /* with a fixed number of pairs their loop is unrolled: two where images are enlarged, else ceil(2 scale) */
        if (axis->pairs == 2)
            resize_strip_512(axis, group, 2, pixels, stride, rows, out, out_stride);
        else if (axis->pairs == 3)
            resize_strip_512(axis, group, 3, pixels, stride, rows, out, out_stride);
        else if (axis->pairs == 4)
            resize_strip_512(axis, group, 4, pixels, stride, rows, out, out_stride);
        else
            resize_strip_512(axis, group, axis->pairs, pixels, stride, rows, out, out_stride);
    }
}

AVX2 static void resize_rows_256(const Axis *axis, const uint8_t *pixels, Py_ssize_t stride, int rows, uint8_t *out,
                                 Py_ssize_t out_stride) {
    for (int group = 0; group < axis->groups; group += 2, out += 8) {
        if (axis->pairs == 2)
            resize_strip_256(axis, group, 2, pixels, stride, rows, out, out_stride);
        else if (axis->pairs == 3)
            resize_strip_256(axis, group, 3, pixels, stride, rows, out, out_stride);
        else if (axis->pairs == 4)
            resize_strip_256(axis, group, 4, pixels, stride, rows, out, out_stride);
        else
            resize_strip_256(axis, group, axis->pairs, pixels, stride, rows, out, out_stride);
    }
}

/* Down the columns: one row of the result, of the rows that it sums up; two are multiplied at once. */
AVX512 INLINE void resize_row_512(const Axis *axis, int place, int pairs, const uint8_t *restrict pixels,
                                  Py_ssize_t stride, int bytes, uint8_t *restrict out) {
    __m512i zero = _mm512_setzero_si512();
    __m512i round = _mm512_set1_epi32(1 << (axis->precision - 1));
    __m128i shift = _mm_cvtsi32_si128(axis->precision);
    const int32_t *restrict rows = axis->rows + (size_t)place * pairs * 2;
    const int32_t *restrict weights = axis->weights + (size_t)place * pairs;
    for (int column = 0; column < bytes; column += 64) {
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
        if (bytes - column >= 64)
            _mm512_storeu_si512(out + column, packed);
        else
            _mm512_mask_storeu_epi8(out + column, lowest(bytes - column), packed);
    }
}

AVX2 INLINE void resize_row_256(const Axis *axis, int place, int pairs, const uint8_t *restrict pixels,
                                Py_ssize_t stride, int bytes, uint8_t *restrict out) {
    __m256i zero = _mm256_setzero_si256();
    __m256i round = _mm256_set1_epi32(1 << (axis->precision - 1));
    __m128i shift = _mm_cvtsi32_si128(axis->precision);
    const int32_t *restrict rows = axis->rows + (size_t)place * pairs * 2;
    const int32_t *restrict weights = axis->weights + (size_t)place * pairs;
    for (int column = 0; column < bytes; column += 32) {
        __m256i sums[4] = {round, round, round, round};
        for (int pair = 0; pair < pairs; pair++) {
            __m256i above = _mm256_loadu_si256((const __m256i *)(pixels + rows[2 * pair] * stride + column));
            __m256i below = _mm256_loadu_si256((const __m256i *)(pixels + rows[2 * pair + 1] * stride + column));
            __m256i weight = _mm256_set1_epi32(weights[pair]);
            __m256i low = _mm256_unpacklo_epi8(above, below), high = _mm256_unpackhi_epi8(above, below);
            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weight));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weight));
            sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weight));
            sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weight));
        }
        for (int part = 0; part < 4; part++) sums[part] = _mm256_sra_epi32(sums[part], shift);
        __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
        uint8_t last[32];
        int is_whole = bytes - column >= 32;
        _mm256_storeu_si256((__m256i *)(is_whole ? out + column : last), packed);
        if (!is_whole) memcpy(out + column, last, bytes - column);
    }
}

AVX512 static void resize_columns_512(const Axis *axis, const uint8_t *pixels, Py_ssize_t stride, int bytes,
                                      uint8_t *out, Py_ssize_t out_stride) {
    for (int place = 0; place < axis->size_out; place++, out += out_stride) {
        if (axis->pairs == 2)
            resize_row_512(axis, place, 2, pixels, stride, bytes, out);
        else if (axis->pairs == 3)
            resize_row_512(axis, place, 3, pixels, stride, bytes, out);
        else if (axis->pairs == 4)
            resize_row_512(axis, place, 4, pixels, stride, bytes, out);
        else
            resize_row_512(axis, place, axis->pairs, pixels, stride, bytes, out);
    }
}

AVX2 static void resize_columns_256(const Axis *axis, const uint8_t *pixels, Py_ssize_t stride, int bytes, uint8_t *out,
                                    Py_ssize_t out_stride) {
    for (int place = 0; place < axis->size_out; place++, out += out_stride) {
        if (axis->pairs == 2)
            resize_row_256(axis, place, 2, pixels, stride, bytes, out);
        else
            resize_row_256(axis, place, axis->pairs, pixels, stride, bytes, out);
    }
}

static void resize_image(const Axis *across, const Axis *down, const uint8_t *pixels, Py_ssize_t stride,
                         uint8_t *between, Py_ssize_t between_stride, uint8_t *out, Py_ssize_t out_stride) {
    int bytes = across->size_out * CHANNELS;
    if (across->bits == 512) {
        resize_rows_512(across, pixels, stride, down->size, between, between_stride);
        resize_columns_512(down, between, between_stride, bytes, out, out_stride);
    } else {
        resize_rows_256(across, pixels, stride, down->size, between, between_stride);
        resize_columns_256(down, between, between_stride, bytes, out, out_stride);
    }
}

static int vector_bits(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))
        return 512;
    return __builtin_cpu_supports("avx2") ? 256 : 0;
}

#else

static void resize_image(const Axis *across, const Axis *down, const uint8_t *pixels, Py_ssize_t stride,
                         uint8_t *between, Py_ssize_t between_stride, uint8_t *out, Py_ssize_t out_stride) {}
static int vector_bits(void) { return 0; }

#endif

static PyObject *call_vector_bits(PyObject *module, PyObject *none) { return PyLong_FromLong(vector_bits()); }

static PyObject *axis_of(const Py_buffer *starts, const Py_buffer *taps, int size, int precision, int bits) {
    Py_ssize_t size_out = starts->len / (Py_ssize_t)sizeof(int32_t);
    Py_ssize_t number = size_out ? taps->len / (Py_ssize_t)sizeof(int16_t) / size_out : 0;
    int is_valid = size > 0 && size < MAX_PIXELS && precision > 0 && precision < 31 && number > 0 && size_out < 1 << 20;
    for (Py_ssize_t place = 0; is_valid && place < size_out; place++) {
        int32_t start = ((const int32_t *)starts->buf)[place];
        is_valid = start >= 0 && start < size;
    }
    if (!is_valid || (bits != 256 && bits != 512)) {
        PyErr_SetString(PyExc_ValueError, "each place needs taps, and begins in the image, of below 2^28 pixels; vectors "
                                          "have 256 or 512 bits");
        return NULL;
    }
    if (number > 2 * MAX_PAIRS) return Py_NewRef(Py_None);
    Axis *axis = make_axis(starts->buf, taps->buf, (int)number, size, (int)size_out, precision, bits);
    if (!axis) return PyErr_NoMemory();
    PyObject *capsule = PyCapsule_New(axis, CAPSULE, free_capsule);
    if (!capsule) free_axis(axis);
    return capsule;
}

static PyObject *call_axis(PyObject *module, PyObject *arguments) {
    Py_buffer starts, taps;
    int size, precision, bits;
    if (!PyArg_ParseTuple(arguments, "y*y*iii", &starts, &taps, &size, &precision, &bits)) return NULL;
    PyObject *axis = axis_of(&starts, &taps, size, precision, bits);
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
    if (across->bits > vector_bits() || across->bits != down->bits || across->is_too_wide ||
        !fits(pixels, down->size, across->size) || !fits(out, down->size_out, across->size_out))
        return Py_NewRef(Py_False);
    Py_ssize_t stride = ((Py_ssize_t)across->groups * across->sums + LINE - 1) / LINE * LINE;
    uint8_t *between = malloc((size_t)stride * down->size);
    if (!between) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    resize_image(across, down, pixels->buf, pixels->strides[0], between, stride, out->buf, out->strides[0]);
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
    {"vector_bits", call_vector_bits, METH_NOARGS, "Bits of the widest vectors that can resize here: 512, 256, or 0."},
    {"axis", call_axis, METH_VARARGS, "Arrange the taps of one direction; None where there are too many."},
    {"resize", call_resize, METH_VARARGS, "Write an image to another by two axes; False where it cannot be done here."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "antialias", "torch's antialiased resizing.", 0, METHODS,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_antialias(void) { return PyModule_Create(&MODULE); }
