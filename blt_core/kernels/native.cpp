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
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
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

inline float total(const Vector& v) {
  float parts[kWidth];
  std::memcpy(parts, &v, sizeof v);
  for (int half = kWidth / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
}

template <typename T>
inline void widen_step(const T* at, Vector& first, Vector& second) {
  if constexpr (is_half<T>) {  // even places, then odd ones (on machines of little endian)
    Bits both;
    std::memcpy(&both, at, sizeof both);
    first = (Vector)(both << 16), second = (Vector)(both & 0xffff0000u);
  } else {
    first = load(at), second = load(at + kWidth);
  }
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

// A step of `some` rows of w by `few` rows of x; `stride`: from one row of w to the next.
template <typename T, int some, int few>
inline void step(Vector (&sums)[few][some], const float* x, const T* w, int64_t stride) {
  Vector first_x[few], second_x[few];
  for (int i = 0; i < few; ++i) {
    first_x[i] = load(x + i * kStep), second_x[i] = load(x + i * kStep + kWidth);
  }
  for (int s = 0; s < some; ++s) {
    Vector first, second;
    widen_step<T>(w + s * stride, first, second);
    for (int i = 0; i < few; ++i) {
      sums[i][s] = fused(first, first_x[i], sums[i][s]);
      sums[i][s] = fused(second, second_x[i], sums[i][s]);
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
  for (int64_t at = 0; at < whole; at += kStep, x += t.rows * kStep) {
    if (r == 0) {
      for (int s = 0; s < some; ++s) __builtin_prefetch(w + s * k + at + ahead);
    }
    step<T, some, few>(sums, x, w + at, k);
  }
  if (whole < k) {
    T last[some][kStep] = {};
    for (int s = 0; s < some; ++s) {
      std::memcpy(last[s], w + s * k + whole, (k - whole) * sizeof(*w));
    }
    step<T, some, few>(sums, x, last[0], kStep);
  }
  for (int i = 0; i < few; ++i) {
    for (int s = 0; s < some; ++s) t.out[(r + i) * t.n + j + s] = narrow<T>(total(sums[i][s]));
  }
}

// Rows of w, `some` of them, by all rows of x, `few` at a time: w stays in the first cache.
template <typename T, int some, int few>
inline void stripe(const Task<T>& t, int64_t j) {
  int64_t r = 0;
  for (; r + few <= t.rows; r += few) tile<T, some, few>(t, j, r);
  for (; r < t.rows; ++r) tile<T, some, 1>(t, j, r);
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
void product(const void* x, const void* w, void* out, int64_t rows, int64_t k, int64_t n) {
  thread_local std::vector<float> kept;
  const size_t size = rows * ((k + kStep - 1) / kStep * kStep);
  if (kept.size() < size) kept.resize(size);
  prepare<T>(static_cast<const T*>(x), kept.data(), rows, k);
  const Task<T> task{kept.data(), static_cast<const T*>(w), static_cast<T*>(out), rows, k, n};
  constexpr int wide = kBytes == 64 ? 4 : 2;  // 32 registers instead of 16
  if (rows == 1 && k * static_cast<int64_t>(sizeof(T)) < kPage) {
    run<T, 1, 1>(task);
  } else if (rows == 1) {
    run<T, 4, 1>(task);
  } else if (rows < 4) {
    run<T, 4, 2>(task);
  } else if (rows < 8) {
    run<T, wide, 4>(task);
  } else {
    run<T, 4, wide>(task);
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
