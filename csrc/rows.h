// What one launch is told about a parameter group, and how a parameter's step count turns it into StepScalars.
//
// The step count lives with the state, on the device where that is, so that a step which the device skips (overflow
// under a GradScaler, a gradient that is not finite) needs no word to the host. Everything that depends on the count is
// therefore computed here; ivon_kernels/hyperparameters.py does the same operations in the same order.
#pragma once

#include "ivon_math.h"

namespace ivon {
namespace IVON_ISA {

// One row of the table that ivon_kernels/hyperparameters.py packs (class Rows).
struct GroupRow {
  StepScalars scalars;  // inv_debias, grad_scale and second_scale before the step count and the AMP scale
  float unused;
  double beta1;
  double lr_factor;            // hess_init + weight_decay with rescale_lr, else 1
  double samples;              // MC samples of the sums
  int64_t debias_until;        // from this update on the bias correction is 1 in float32; 0: no correction
  const double* lr_on_device;  // capturable: the learning rate before lr_factor; null: scalars.lr holds all of it
};
static_assert(sizeof(GroupRow) == 96, "hyperparameters.py packs rows of 96 bytes");

// base^exponent by squaring. Multiplications alone: nothing can be contracted, so all devices agree on the bits.
IVON_FN double power(double base, int64_t exponent) {
  double result = 1.0;
  while (exponent != 0) {
    if (exponent & 1) result = result * base;
    base = base * base;
    exponent >>= 1;
  }
  return result;
}

// The scalars of the update after `step` finished ones. `amp_scale`: the GradScaler's scale, or null.
IVON_FN StepScalars resolve(const GroupRow& row, int64_t step, const float* amp_scale) {
  StepScalars k = row.scalars;
  if (step + 1 < row.debias_until) k.inv_debias = static_cast<float>(1.0 / (1.0 - power(row.beta1, step + 1)));
  if (row.lr_on_device != nullptr) k.lr = static_cast<float>(*row.lr_on_device * row.lr_factor);
  if (amp_scale != nullptr) {
    const double scale = *amp_scale;
    k.grad_scale = static_cast<float>(1.0 / (scale * row.samples));
    k.second_scale = static_cast<float>(1.0 / ((k.gradsq != 0.0f ? scale * scale : scale) * row.samples));
  }
  return k;
}

}  // namespace IVON_ISA
}  // namespace ivon
