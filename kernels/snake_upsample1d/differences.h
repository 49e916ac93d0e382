// The repeat mode by differences of frames: which taps move from one phase to the next. README.md has the derivation.
#pragma once
#include "params.h"

namespace dcx {

// The op's number of this form: products of a phase, where the direct form takes up to 3.
constexpr int kUpsampleDifferences = 2;

// The one phase that reads two frames: taps 0 .. S - 1 fall on the first of them, the others on the second.
inline int64_t difference_base(const UpsamplePhases& phases) { return phases.pad_left % phases.stride; }

// Of the two taps that move a frame on between phase i - 1 and phase i, 1 <= i < S, the earlier one; the other is S
// taps on.
inline int64_t moving_tap(const UpsamplePhases& phases, int64_t i) {
  return (phases.stride - i + phases.pad_left) % phases.stride;
}

}  // namespace dcx
