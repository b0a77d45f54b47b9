// The operator of torch that calls the loop: what runs eagerly and compiled programs both name it.

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

extern "C" void blt_product(int64_t half, const void* x, const void* w, void* out, int64_t rows,
                            int64_t k, int64_t n);

namespace {

// Rows of float32 up to which the loop may be the faster one. In bfloat16 no number of rows makes
// torch faster on a CPU where it is slower with the rows that are measured.
constexpr int64_t kMostFloats = 64;

at::Tensor product(const at::Tensor& x, const at::Tensor& weight) {
  const auto dtype = weight.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16, "a weight of ", dtype,
                    "; expected float32 or bfloat16");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.is_contiguous(), "a weight of shape ",
                    weight.sizes(), "; expected a contiguous one, (n, k)");
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == weight.size(1) && x.scalar_type() == dtype,
                    "rows ", x.sizes(), " of ", x.scalar_type(), "; expected (..., ",
                    weight.size(1), ") of ", dtype);
  if (dtype == at::kFloat && x.numel() > kMostFloats * weight.size(1)) return at::linear(x, weight);
  const at::Tensor rows = x.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  at::Tensor out = at::empty(shape, x.options());
  if (x.numel() == 0) return out.zero_();
  if (out.numel() > 0) {
    blt_product(dtype == at::kBFloat16, rows.const_data_ptr(), weight.const_data_ptr(),
                out.mutable_data_ptr(), rows.numel() / x.size(-1), x.size(-1), weight.size(0));
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(blt_core, CPU, m) { m.impl("product", product); }
