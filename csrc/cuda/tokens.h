// Rewards of sequences of token log-probs, and reading numbers of any dtype.
#pragma once

#include "../stored.h"
#include "sequence_args.h"
#include "team.h"

namespace pad {
namespace PAD_ISA {

PAD_DEVICE double read_number(const NumbersArgs& numbers, int64_t index) {
  if (numbers.dtype == DType::float32) return static_cast<const float*>(numbers.at)[index];
  if (numbers.dtype == DType::float64) return static_cast<const double*>(numbers.at)[index];
  if (numbers.dtype == DType::bfloat16)
    return load(static_cast<const bfloat16*>(numbers.at)[index]);
  return load(static_cast<const float16*>(numbers.at)[index]);
}

PAD_DEVICE void write_number(void* to, DType dtype, int64_t index, double value) {
  if (dtype == DType::float32)
    static_cast<float*>(to)[index] = float(value);
  else if (dtype == DType::float64)
    static_cast<double*>(to)[index] = value;
  else if (dtype == DType::bfloat16)
    static_cast<bfloat16*>(to)[index] = store<bfloat16>(float(value));
  else
    static_cast<float16*>(to)[index] = store<float16>(float(value));
}

struct Span {
  int64_t begin, end;
};

// The tokens of a sequence. Boundaries that are none are kept from leading out of memory.
PAD_DEVICE Span tokens_of(const TokensArgs& tokens, int64_t sequence) {
  if (!tokens.offsets) return {sequence * tokens.length, (sequence + 1) * tokens.length};
  int64_t begin = tokens.offsets[sequence], end = tokens.offsets[sequence + 1];
  begin = begin < 0 ? 0 : begin > tokens.total ? tokens.total : begin;
  end = end < begin ? begin : end > tokens.total ? tokens.total : end;
  return {begin, end};
}

PAD_DEVICE bool counts(const TokensArgs& tokens, int64_t token) {
  if (tokens.mask && !tokens.mask[token]) return false;
  if (!tokens.labels) return true;
  const int64_t label = tokens.label_bytes == 4
                            ? int64_t(static_cast<const int32_t*>(tokens.labels)[token])
                            : static_cast<const int64_t*>(tokens.labels)[token];
  return label != tokens.ignore_index;
}

struct Reward {
  double value, inverse_count;
};

// The reward of a sequence, in every thread. A sequence in which nothing counts has reward 0.
template <class Team>
PAD_DEVICE Reward reward_of(Team& team, const TokensArgs& tokens, int64_t sequence) {
  const Span span = tokens_of(tokens, sequence);
  Numbers<2> found = {{0, 0}};
  for (int64_t token = span.begin + team.rank(); token < span.end; token += team.size()) {
    if (!counts(tokens, token)) continue;
    found.value[0] += read_number(tokens.logprob, token);
    found.value[1] += 1;
  }
  found = team.reduce(found, AddNumbers<2>());
  const double inverse = tokens.mean && found.value[1] > 1 ? 1 / found.value[1] : 1.0;
  return {found.value[0] * inverse, inverse};
}

}  // namespace PAD_ISA
}  // namespace pad
