// Products x · wᵀ of a few rows. They are bound by reading w, so it is read once, widened to float32
// as it comes, and summed in float32.
//
// The bits of a row's product depend on neither the other rows nor the number of threads: each
// output is one chain of multiply-adds over k, always in the same order, by one thread.
//
// x (rows, k), w (n, k) and out (rows, n) are row-major. For GCC and Clang: vectors are theirs.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// bfloat16, by its bits; weights are of this type or float32.
using Half = uint16_t;
template <typename T>
constexpr bool is_half = std::is_same_v<T, Half>;

// -- single numbers -------------------------------------------------------------------------------

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <typename T>
inline float widen(T value) {
  if constexpr (is_half<T>) return from_bits(static_cast<uint32_t>(value) << 16);
  if constexpr (!is_half<T>) return value;
}

template <typename T>
inline T narrow(float value) {
  if constexpr (is_half<T>) {
    const uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<Half>(bits >> 16 | 0x40);
    return static_cast<Half>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  if constexpr (!is_half<T>) return value;
}

// -- vectors, and a step of weights, which is widened to two of them ------------------------------

#if defined(__AVX512F__)
constexpr int kBytes = 64, kRegisters = 32;
#else
constexpr int kBytes = 32, kRegisters = 16;
#endif
constexpr int kWidth = kBytes / sizeof(float);
constexpr int64_t kStep = 2 * kWidth;
typedef float Vector __attribute__((vector_size(kBytes)));
typedef uint32_t Bits __attribute__((vector_size(kBytes)));

inline Vector load(const float* at) {
  Vector v;
  std::memcpy(&v, at, sizeof v);
  return v;
}

// a · b + c, rounded once where the machine can: never left to the compiler, which may round twice
// in one place and once in another.
inline Vector fused(const Vector& a, const Vector& b, const Vector& c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The sum of a vector's numbers: halves are added until one is left.
inline float total(const Vector& v) {
  float parts[kWidth];
  std::memcpy(parts, &v, sizeof v);
  for (int half = kWidth / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
}

#if defined(__AVX__)
inline __m128 four_parts(const Vector& v) {
#if defined(__AVX512F__)
  const __m512d wide = _mm512_castps_pd((__m512)v);
  const __m256 half = _mm256_add_ps(_mm256_castpd_ps(_mm512_castpd512_pd256(wide)),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd(wide, 1)));
#else
  const __m256 half = (__m256)v;
#endif
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#endif

// The totals of `count` vectors; four at a time where the machine can: short rows have as many sums
// to total as products to add.
template <int count>
inline void totals(const Vector* sums, float* to) {
  int done = 0;
#if defined(__AVX__)
  for (; done + 4 <= count; done += 4) {
    __m128 a = four_parts(sums[done]), b = four_parts(sums[done + 1]);
    __m128 c = four_parts(sums[done + 2]), d = four_parts(sums[done + 3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(to + done, _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d)));
  }
#endif
  for (; done < count; ++done) to[done] = total(sums[done]);
}

// A half of a step of weights. Of halves the first has the even places, the second the odd ones (on
// machines of little endian).
template <typename T>
inline Vector widened(const T* step, int half) {
  if constexpr (is_half<T>) {
    Bits both;
    std::memcpy(&both, step, sizeof both);
    return (Vector)(half ? both & 0xffff0000u : both << 16);
  }
  if constexpr (!is_half<T>) return load(step + half * kWidth);
}

// -- products -------------------------------------------------------------------------------------

// Rows of x in float32: those of a step side by side, in the order in which weights are widened;
// the last step is filled with zeros.
template <typename T>
void prepare(const T* x, float* to, int64_t rows, int64_t k) {
  constexpr bool mixed = is_half<T>;
  const auto value = [&](const T* row, int64_t at) {
    return at < k ? widen<T>(row[at]) : 0.0f;
  };
  for (int64_t r = 0; r < rows; ++r, x += k) {
    for (int64_t at = 0; at < k; at += kStep) {
      float* step = to + at * rows + r * kStep;
      for (int i = 0; i < kWidth; ++i) {
        step[i] = value(x, at + (mixed ? 2 * i : i));
        step[i + kWidth] = value(x, at + (mixed ? 2 * i + 1 : i + kWidth));
      }
    }
  }
}

// What one call computes.
template <typename T>
struct Task {
  const float* x;  // as prepared
  const T* w;
  T* out;
  int64_t rows, k, n;
};

// How far ahead of its use a row of w is fetched, in bytes; rows shorter than a page run together.
constexpr int64_t kAhead = 2048;
constexpr int64_t kPage = 4096;

// Has a vector stay in a register: compilers would rather load it again for each use, and loads are
// what a step waits for.
inline void keep(Vector& v) {
#if defined(__AVX__)
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#else
  __asm__("" : "+x"(v));
#endif
#endif
}

// A step of `some` rows of w by `few` rows of x; `stride`: from one row of w to the next.
template <typename T, int some, int few>
inline void step(Vector (&sums)[few][some], const float* x, const T* w, int64_t stride) {
  // Both halves of a step at once where registers suffice: then halves are read once.
  constexpr int at_once = few * (some + 2) + 2 <= kRegisters ? 2 : 1;
  for (int half = 0; half < 2; half += at_once) {
    Vector own_x[at_once][few];
    for (int h = 0; h < at_once; ++h) {
      for (int i = 0; i < few; ++i) {
        own_x[h][i] = load(x + i * kStep + (half + h) * kWidth);
        if constexpr (some > 1) keep(own_x[h][i]);
      }
    }
    for (int s = 0; s < some; ++s) {
      for (int h = 0; h < at_once; ++h) {
        const Vector own_w = widened<T>(w + s * stride, half + h);
        for (int i = 0; i < few; ++i) sums[i][s] = fused(own_w, own_x[h][i], sums[i][s]);
      }
    }
  }
}

// Rows `j` of w, `some` of them, by rows `r` of x, `few` of them.
template <typename T, int some, int few>
inline void tile(const Task<T>& t, int64_t j, int64_t r) {
  const int64_t k = t.k, whole = k / kStep * kStep;
  const T* w = t.w + j * k;
  const int64_t ahead = some == 1 ? kAhead / static_cast<int64_t>(sizeof(*w)) : some * k;
  Vector sums[few][some] = {};
  const float* x = t.x + r * kStep;
  // Of the next rows of w each tile over these fetches its share.
  const int64_t first = some * r / t.rows, end = some * (r + few) / t.rows;
  for (int64_t at = 0; at < whole; at += kStep, x += t.rows * kStep) {
    for (int64_t s = first; s < end; ++s) __builtin_prefetch(w + s * k + at + ahead);
    step<T, some, few>(sums, x, w + at, k);
  }
  if (whole < k) {
    T last[some][kStep] = {};
    for (int s = 0; s < some; ++s) {
      std::memcpy(last[s], w + s * k + whole, (k - whole) * sizeof(*w));
    }
    step<T, some, few>(sums, x, last[0], kStep);
  }
  float found[few * some];
  totals<few * some>(&sums[0][0], found);
  for (int i = 0; i < few; ++i) {
    for (int s = 0; s < some; ++s) t.out[(r + i) * t.n + j + s] = narrow<T>(found[i * some + s]);
  }
}

// Rows of w, `some` of them, by all rows of x, `few` at a time: w stays in the first cache.
template <typename T, int some, int few>
inline void stripe(const Task<T>& t, int64_t j) {
  int64_t r = 0;
  const auto left = [&] { return t.rows - r; };
  // Not one alone at the end, if it can be: that would read w for little work.
  if constexpr (few > 2) {
    for (; left() >= few && left() != few + 1; r += few) tile<T, some, few>(t, j, r);
  }
  if constexpr (few > 3) {
    if (left() == 3 || left() == few + 1) tile<T, some, 3>(t, j, r), r += 3;
  }
  if constexpr (few > 1) {
    for (; left() >= 2; r += 2) tile<T, some, 2>(t, j, r);
  }
  for (; left() > 0; ++r) tile<T, some, 1>(t, j, r);
}

// Multiply-adds that are worth a thread.
constexpr int64_t kGrain = 32768;

template <typename T, int some, int few>
void run(const Task<T>& t) {
  const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(some * t.k * t.rows, 1), 1);
  at::parallel_for(0, (t.n + some - 1) / some, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * some; i < end * some; i += some) {
      if (i + some <= t.n) {
        stripe<T, some, few>(t, i);
      } else {
        for (int64_t j = i; j < t.n; ++j) stripe<T, 1, few>(t, j);
      }
    }
  });
}

template <typename T>
void block(const T* x, const T* w, T* out, int64_t rows, int64_t k, int64_t n) {
  thread_local std::vector<float> kept;
  const size_t size = rows * ((k + kStep - 1) / kStep * kStep);
  if (kept.size() < size) kept.resize(size);
  prepare<T>(x, kept.data(), rows, k);
  const Task<T> task{kept.data(), w, out, rows, k, n};
  constexpr int few = kRegisters == 32 ? 4 : 3;  // 4 * few sums
  if (rows == 1 && k * static_cast<int64_t>(sizeof(T)) < kPage) {
    run<T, 1, 1>(task);
  } else if (rows == 1) {
    run<T, 4, 1>(task);
  } else if (rows == 4) {
    run<T, kRegisters == 32 ? 4 : 2, 4>(task);  // in one go: four rows still wait for memory
  } else {
    run<T, 4, few>(task);
  }
}

// Rows of x that are prepared at a time: what is kept for them is bounded.
constexpr int64_t kMost = 64;

template <typename T>
void product(const void* x, const void* w, void* out, int64_t rows, int64_t k, int64_t n) {
  for (int64_t r = 0; r < rows; r += kMost) {
    block<T>(static_cast<const T*>(x) + r * k, static_cast<const T*>(w),
             static_cast<T*>(out) + r * n, std::min(kMost, rows - r), k, n);
  }
}

}  // namespace

extern "C" void blt_product(int64_t half, const void* x, const void* w, void* out, int64_t rows,
                            int64_t k, int64_t n) {
  if (half) {
    product<Half>(x, w, out, rows, k, n);
  } else {
    product<float>(x, w, out, rows, k, n);
  }
}
