// Products x · wᵀ of a few rows, summed in float32. Of up to four rows they are bound by reading w,
// of more by arithmetic: w is read once for up to 32 rows.
//
// The bits of a row's product depend on neither the other rows nor the number of threads: each
// output is a vector of chains of multiply-adds over k, always in the same order, by one thread,
// then the total of that vector.
//
// x (rows, k), w (n, k) and out (rows, n) are row-major. Vectors are those of GCC.

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

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
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

// Loops over sums are unrolled early, or compilers keep sums in memory.
#define UNROLLED _Pragma("GCC unroll 16")

// -- vectors, and steps of them -------------------------------------------------------------------

// BLT_LIKE_AVX512_BF16 has the code for such a CPU run on others, instruction by instruction in
// their own: to test it.
#if defined(__AVX512BF16__) || defined(BLT_LIKE_AVX512_BF16)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif
#if defined(__AVX512F__) || defined(BLT_LIKE_AVX512_BF16)
constexpr int kBytes = 64, kRegisters = 32;
#else
constexpr int kBytes = 32, kRegisters = 16;
#endif
constexpr int kWidth = kBytes / sizeof(float);
constexpr int64_t kStep = 2 * kWidth;
typedef float Vector __attribute__((vector_size(kBytes)));
typedef float Stored __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(kBytes)));
typedef uint32_t StoredBits __attribute__((vector_size(kBytes), aligned(2), may_alias));

// Numbers of a step are multiplied as float32, in two vectors; those of bfloat16 as they are where
// the CPU adds up products of pairs of them, in one vector of pairs.
template <typename T>
constexpr bool in_pairs = kPairs && is_half<T>;
template <typename T>
using Cell = std::conditional_t<in_pairs<T>, Half, float>;
template <typename T>
using Factor = std::conditional_t<in_pairs<T>, Bits, Vector>;
// Vectors of a step, and numbers in each.
template <typename T>
constexpr int kParts = in_pairs<T> ? 1 : 2;
template <typename T>
constexpr int64_t kPart = kStep / kParts<T>;

inline Vector load(const float* at) { return *reinterpret_cast<const Stored*>(at); }

inline Bits load(const Half* at) { return *reinterpret_cast<const StoredBits*>(at); }

inline void store(float* at, const Vector& v) { *reinterpret_cast<Stored*>(at) = v; }

inline void store(Half* at, const Bits& v) { *reinterpret_cast<StoredBits*>(at) = v; }

// Adds a · b to a sum, rounded once on x86-64 with FMA or AVX-512: never left to the compiler, which
// may round twice in one place and once in another. Of the forms of the instruction it gets the one
// that writes the sum: with the others it copies sums to and fro until registers run out.
inline void add_product(Vector& sum, const Vector& a, const Vector& b) {
#if defined(__AVX512F__)
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(__FMA__) && !defined(BLT_LIKE_AVX512_BF16)
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
  sum = a * b + sum;
#endif
}

// Adds the products of pairs of bfloat16 to a sum, that of the odd places first.
inline void add_product(Vector& sum, const Bits& a, const Bits& b) {
#if defined(__AVX512BF16__)
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
  sum = (Vector)(a & 0xffff0000u) * (Vector)(b & 0xffff0000u) + sum;
  sum = (Vector)(a << 16) * (Vector)(b << 16) + sum;
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

#if defined(__AVX__) && (defined(__AVX512F__) || !defined(BLT_LIKE_AVX512_BF16))
#define FOUR_TOTALS
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

// The totals of `count` vectors in memory; four at a time where the machine can: short rows have as
// many sums to total as products to add.
template <int count>
inline void totals(const float* sums, float* to) {
  int done = 0;
#if defined(FOUR_TOTALS)
  for (; done + 4 <= count; done += 4, sums += 4 * kWidth) {
    __m128 a = four_parts(load(sums)), b = four_parts(load(sums + kWidth));
    __m128 c = four_parts(load(sums + 2 * kWidth)), d = four_parts(load(sums + 3 * kWidth));
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(to + done, _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d)));
  }
#endif
  for (; done < count; ++done, sums += kWidth) to[done] = total(load(sums));
}

// A part of a step, as it is multiplied. Of bfloat16 in float32 the first has the even places, the
// second the odd ones (on machines of little endian).
template <typename T>
inline Factor<T> widened(const T* step, int part) {
  if constexpr (is_half<T> && !in_pairs<T>) {
    const Bits both = load(step);
    return (Vector)(part ? both & 0xffff0000u : both << 16);
  }
  if constexpr (!is_half<T> || in_pairs<T>) return load(step + part * kPart<T>);
}

// -- products -------------------------------------------------------------------------------------

// Writes a step as it is multiplied, of which there are `count` numbers: the rest become zeros.
template <typename T>
inline void widen_step(const T* step, int64_t count, Cell<T>* to) {
  T part[kStep] = {};
  if (count < kStep) {
    if (count > 0) std::memcpy(part, step, count * sizeof(T));
    step = part;
  }
  for (int i = 0; i < kParts<T>; ++i) store(to + i * kPart<T>, widened<T>(step, i));
}

// Rows of x as they are multiplied: those of a step side by side.
template <typename T>
void prepare(const T* x, Cell<T>* to, int64_t rows, int64_t k) {
  for (int64_t at = 0; at < k; at += kStep) {
    for (int64_t r = 0; r < rows; ++r, to += kStep) widen_step(x + r * k + at, k - at, to);
  }
}

// What one call computes.
template <typename T>
struct Task {
  const Cell<T>* x;  // as prepared
  const T* w;
  T* out;
  int64_t rows, k, n;
};

// Multiply-adds that are worth a thread.
constexpr int64_t kGrain = 32768;

// Adds a step of `some` rows of w by `few` rows of x to their sums; `weights(row, part)` are vectors
// of w. Sums stay in registers if they are an array that nothing points to, in a function of its own.
template <typename T, int some, int few, typename Weights>
inline void step(Vector (&sums)[few][some], const Cell<T>* x, const Weights& weights) {
  UNROLLED for (int part = 0; part < kParts<T>; ++part) {
    Factor<T> own_x[few];
    UNROLLED for (int i = 0; i < few; ++i) own_x[i] = load(x + i * kStep + part * kPart<T>);
    UNROLLED for (int s = 0; s < some; ++s) {
      const Factor<T> own_w = weights(s, part);
      UNROLLED for (int i = 0; i < few; ++i) add_product(sums[i][s], own_w, own_x[i]);
    }
  }
}

// Writes sums to memory, row by row of x.
template <int some, int few>
inline void store_all(float* to, const Vector (&sums)[few][some]) {
  UNROLLED for (int i = 0; i < few; ++i) {
    UNROLLED for (int s = 0; s < some; ++s) store(to + (i * some + s) * kWidth, sums[i][s]);
  }
}

// Fetches what a step reads of a row of w.
template <typename T>
inline void fetch(const T* w) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t at = 0; at < kStep; at += line) __builtin_prefetch(w + at);
}

// -- up to four rows: w as it comes from memory ---------------------------------------------------

// How far ahead of its use a row of w is fetched, in bytes; rows shorter than a page run together.
constexpr int64_t kAhead = 2048;
constexpr int64_t kPage = 4096;

// Rows `j` of w, `some` of them, by all rows of x, of which there are `few`.
template <typename T, int some, int few>
__attribute__((noinline)) void tile(const Task<T>& t, int64_t j) {
  const int64_t k = t.k, whole = k / kStep * kStep;
  const T* w = t.w + j * k;
  const int64_t ahead = some == 1 ? kAhead / static_cast<int64_t>(sizeof(*w)) : some * k;
  Vector sums[few][some] = {};
  const Cell<T>* x = t.x;
  for (int64_t at = 0; at < whole; at += kStep, x += few * kStep) {
    for (int s = 0; s < some; ++s) fetch(w + s * k + at + ahead);
    step<T>(sums, x, [=](int s, int part) { return widened<T>(w + s * k + at, part); });
  }
  if (whole < k) {
    T last[some][kStep] = {};
    for (int s = 0; s < some; ++s) {
      std::memcpy(last[s], w + s * k + whole, (k - whole) * sizeof(*w));
    }
    const T(*rest)[kStep] = last;
    step<T>(sums, x, [=](int s, int part) { return widened<T>(rest[s], part); });
  }
  float kept[few * some * kWidth], found[few * some];
  store_all(kept, sums);
  totals<few * some>(kept, found);
  for (int i = 0; i < few; ++i) {
    for (int s = 0; s < some; ++s) t.out[i * t.n + j + s] = narrow<T>(found[i * some + s]);
  }
}

template <typename T, int some, int few>
void run(const Task<T>& t) {
  const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(some * t.k * few, 1), 1);
  at::parallel_for(0, (t.n + some - 1) / some, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * some; i < end * some; i += some) {
      if (i + some <= t.n) {
        tile<T, some, few>(t, i);
      } else {
        for (int64_t j = i; j < t.n; ++j) tile<T, 1, few>(t, j);
      }
    }
  });
}

// -- more rows: w is widened once, by the first rows of x -----------------------------------------

// Rows of w and of x whose sums registers hold.
constexpr int kTall = 4, kFew = kRegisters == 32 ? 4 : 3;
// Numbers of x and w in a chunk of columns, which come from the second cache again and again.
constexpr int64_t kCached = 12288;
// Stripes of w that go through a chunk of x before the next chunk; their sums stay in that cache too.
constexpr int64_t kGroup = 16;

// kTall rows of w, of which some columns are in work.
template <typename T>
struct Stripe {
  const T* w;     // the first of these columns
  int64_t k;      // from one row to the next
  int64_t steps;  // of columns in work
  Cell<T>* wide;  // these columns as they are multiplied: those of a step of all rows side by side
};

// Columns of two rows that come next: fetched a step at a time.
template <typename T>
struct Ahead {
  const T *a, *b;
};

// Widens the columns in work where rows or columns are missing: those become zeros.
template <typename T>
void widen_part(const Stripe<T>& w, int64_t rows, int64_t columns) {
  for (int64_t at = 0; at < w.steps * kStep; at += kStep) {
    for (int64_t s = 0; s < kTall; ++s) {
      widen_step(w.w + s * w.k + at, s < rows ? columns - at : 0, w.wide + at * kTall + s * kStep);
    }
  }
}

// Adds the columns in work by `few` rows of x to their sums in memory, and widens them on the way if
// that is left to do.
template <typename T, int few, bool widen>
__attribute__((noinline)) void add(const Stripe<T>& w, const Cell<T>* x, int64_t x_step,
                                   float* kept, bool first, Ahead<T> ahead) {
  Vector sums[few][kTall] = {};
  if (!first) {
    UNROLLED for (int i = 0; i < few; ++i) {
      UNROLLED for (int s = 0; s < kTall; ++s) sums[i][s] = load(kept + (i * kTall + s) * kWidth);
    }
  }
  const T* narrow_w = w.w;
  Cell<T>* wide = w.wide;
  const int64_t k = w.k;
  for (int64_t left = w.steps; left; --left) {
    fetch(ahead.a);
    fetch(ahead.b);
    step<T>(sums, x, [=](int s, int part) {
      Cell<T>* cell = wide + s * kStep + part * kPart<T>;
      if constexpr (!widen) return load(cell);
      const Factor<T> own_w = widened<T>(narrow_w + s * k, part);
      store(cell, own_w);
      return own_w;
    });
    x += x_step, wide += kTall * kStep, narrow_w += kStep, ahead.a += kStep, ahead.b += kStep;
  }
  store_all(kept, sums);
}

// As many numbers as are asked for, from the start of a line of the cache; kept between calls.
template <typename T>
class Room {
 public:
  T* of(size_t count) {
    constexpr size_t line = 64;
    if (room_.size() < count + line) {
      room_.clear();  // nothing of it is needed
      room_.resize(count + line);
    }
    const auto at = reinterpret_cast<uintptr_t>(room_.data());
    return reinterpret_cast<T*>((at + line - 1) / line * line);
  }

 private:
  std::vector<T> room_;
};

template <typename T, bool widen>
auto adder(int64_t few) {
  if (few == 2) return add<T, 2, widen>;
  return few == 3 ? add<T, 3, widen> : add<T, kFew, widen>;
}

// Adds stripe `i`, `steps` of it from step `from`, by all rows of x to their sums. next: of w, what
// is added after it.
template <typename T>
void add_rows(const Task<T>& t, int64_t i, int64_t from, int64_t steps, const T* next,
              Cell<T>* wide, float* sums) {
  const int64_t column = from * kStep;
  const Stripe<T> stripe{t.w + i * kTall * t.k + column, t.k, steps, wide};
  const Cell<T>* x = t.x + column * t.rows;
  bool widen = (i + 1) * kTall <= t.n && column + steps * kStep <= t.k;
  if (!widen) widen_part(stripe, t.n - i * kTall, t.k - column);
  for (int64_t r = 0, few; r < t.rows; r += few, widen = false) {
    // Not one alone at the end: it would read w for little work.
    few = std::min<int64_t>(kFew, t.rows - r);
    if (t.rows - r - few == 1) --few;
    // All rows of x fetch a share of what comes next.
    const int64_t first = kTall * r / t.rows;
    const int64_t last = std::max(first, kTall * (r + few) / t.rows - 1);
    const Ahead<T> ahead{next + first * t.k, next + last * t.k};
    (widen ? adder<T, true>(few) : adder<T, false>(few))(
        stripe, x + r * kStep, t.rows * kStep, sums + r * kTall * kWidth, from == 0, ahead);
  }
}

// Writes the totals of stripe `i`.
template <typename T>
void finish(const Task<T>& t, int64_t i, const float* sums) {
  const int64_t j = i * kTall, some = std::min<int64_t>(kTall, t.n - j);
  for (int64_t r = 0; r < t.rows; ++r, sums += kTall * kWidth) {
    float found[kTall];
    totals<kTall>(sums, found);
    T ready[kTall];
    for (int s = 0; s < kTall; ++s) ready[s] = narrow<T>(found[s]);
    std::memcpy(t.out + r * t.n + j, ready, some * sizeof(T));
  }
}

template <typename T>
void run_many(const Task<T>& t) {
  const int64_t steps = (t.k + kStep - 1) / kStep, stripes = (t.n + kTall - 1) / kTall;
  const int64_t fitting = kCached / (kStep * (t.rows + kTall));  // more than 2, whatever the rows
  const int64_t chunk = std::min(fitting / 2 * 2, steps);        // whole lines of bfloat16
  const int64_t group = chunk < steps ? kGroup : 1, sums = t.rows * kTall * kWidth;
  const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(kTall * t.k * t.rows, 1), 1);
  at::parallel_for(0, stripes, grain, [&](int64_t begin, int64_t end) {
    thread_local Room<float> of_sums;
    thread_local Room<Cell<T>> of_stripe;
    float* const kept = of_sums.of(group * sums);
    Cell<T>* const wide = of_stripe.of(chunk * kTall * kStep);
    for (int64_t first = begin; first < end; first += group) {
      const int64_t some = std::min(group, end - first);
      for (int64_t from = 0; from < steps; from += chunk) {
        const int64_t now = std::min(chunk, steps - from), then = from + now;
        const auto at = [&](int64_t i, int64_t step) {
          return t.w + i * kTall * t.k + step * kStep;
        };
        for (int64_t i = first; i < first + some; ++i) {
          const bool goes_on = i + 1 < first + some;
          const T* next = goes_on ? at(i + 1, from) : then < steps ? at(first, then) : at(i + 1, 0);
          add_rows(t, i, from, now, next, wide, kept + (i - first) * sums);
        }
      }
      for (int64_t i = 0; i < some; ++i) finish(t, first + i, kept + i * sums);
    }
  });
}

// -- any number of rows ---------------------------------------------------------------------------

template <typename T>
void block(const T* x, const T* w, T* out, int64_t rows, int64_t k, int64_t n) {
  thread_local Room<Cell<T>> room;
  Cell<T>* const prepared = room.of(rows * ((k + kStep - 1) / kStep * kStep));
  prepare<T>(x, prepared, rows, k);
  const Task<T> task{prepared, w, out, rows, k, n};
  if (rows == 1 && k * static_cast<int64_t>(sizeof(T)) < kPage) {
    run<T, 1, 1>(task);
  } else if (rows == 1) {
    run<T, 4, 1>(task);
  } else if (rows == 2) {
    run<T, 4, 2>(task);
  } else if (rows == 3) {
    run<T, kRegisters == 32 ? 4 : 3, 3>(task);
  } else if (rows == 4) {
    run<T, kRegisters == 32 ? 4 : 2, 4>(task);
  } else {
    run_many<T>(task);
  }
}

// Rows of x that are prepared at a time: what is kept for them is bounded.
constexpr int64_t kMost = 32;

template <typename T>
void product(const void* x, const void* w, void* out, int64_t rows, int64_t k, int64_t n) {
  const int64_t blocks = (rows + kMost - 1) / kMost;
  for (int64_t b = 0, r = 0; b < blocks; ++b) {
    const int64_t some = rows * (b + 1) / blocks - r;
    block<T>(static_cast<const T*>(x) + r * k, static_cast<const T*>(w),
             static_cast<T*>(out) + r * n, some, k, n);
    r += some;
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
