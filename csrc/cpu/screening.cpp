// The operators of exact screening on a CPU. A "word" is a vocabulary entry, a "block" as many words as the kernels of
// an instruction set take at once. Blocks are independent of each other: any number of threads gives the same bytes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "../checks.h"
#include "instruction_sets.h"

namespace splade_kernels::cpu {
namespace {

// Words per strip: the quantised and exact rows of a strip are used for all tokens before the next strip is touched.
constexpr int64_t kStrip = 128;

// How many pieces of `work` multiply-adds each are worth a thread.
int64_t grain(int64_t work) { return std::max<int64_t>(1, (int64_t{1} << 18) / std::max<int64_t>(1, work)); }

// Calls f with the kernels of an instruction set for a dtype of the weight.
template <class Function>
void with_kernels(const std::string& name, ScalarType dtype, Function&& f) {
  const auto* set = kInstructionSets;
  while (*set != nullptr && !(name == (*set)->name && (*set)->supported())) ++set;
  STD_TORCH_CHECK(*set != nullptr, "instruction_set: expected one that this CPU has, got '", name, "'");
  switch (dtype) {
    case ScalarType::Float: return f((*set)->float32);
    case ScalarType::BFloat16: return f((*set)->bfloat16);
    case ScalarType::Half: return f((*set)->float16);
    default: STD_TORCH_CHECK(false, "weight: expected float32, bfloat16 or float16");
  }
}

void check_weight(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) > 0, "weight: expected shape [V, D], D > 0");
  STD_TORCH_CHECK(weight.stride(1) == 1 || weight.size(1) == 1, "weight: expected rows without gaps");
  STD_TORCH_CHECK(weight.size(1) <= kMaxHiddenSize, "weight: expected at most ", kMaxHiddenSize, " hidden dimensions");
}

// Memory for `lanes` quantised words, a whole number of blocks; somebody else owns it.
struct Memory {
  int8_t* blocks;
  float* bounds;  // [3, lanes]: scale, radius, reach
  int32_t* shift;
  int64_t lanes;

  Words at(int64_t v, int64_t depth) const {
    return {blocks + v * depth, bounds + v, bounds + lanes + v, bounds + 2 * lanes + v, shift + v};
  }
};

// Quantises the words [first, last) of the weight, whole blocks but for the last one, into the memory from `to` on.
template <class W>
void quantise(
    const Kernels<W>& kernels, const W* weight, int64_t stride, int64_t first, int64_t last, int64_t hidden_size,
    int64_t depth, const Memory& memory, int64_t to) {
  for (int64_t v = first; v < last; v += kernels.words, to += kernels.words) {
    kernels.quantise_block(
        weight + v * stride, stride, std::min<int64_t>(kernels.words, last - v), hidden_size, depth,
        memory.blocks + to * depth, memory.bounds + to, memory.bounds + memory.lanes + to,
        memory.bounds + 2 * memory.lanes + to, memory.shift + to);
  }
}

// Blocks [blocks, depth / group, words, group] int8 (`Words`), bounds [3, blocks · words] float32 (scale, radius, reach),
// shift int32.
std::tuple<Tensor, Tensor, Tensor> quantise_words(Tensor weight, std::string instruction_set) {
  check_weight(weight);
  const int64_t vocab_size = weight.size(0), hidden_size = weight.size(1), stride = weight.stride(0);
  const int64_t depth = divide_up(hidden_size, kDepthStep) * kDepthStep;
  Tensor quantised, bounds, shift;
  with_kernels(instruction_set, weight.scalar_type(), [&]<class W>(const Kernels<W>& kernels) {
    const int64_t blocks = divide_up(vocab_size, kernels.words), lanes = blocks * kernels.words;
    quantised = torch::stable::new_zeros(weight, {lanes * depth}, ScalarType::Char);
    bounds = torch::stable::new_zeros(weight, {3, lanes}, ScalarType::Float);
    shift = torch::stable::new_zeros(weight, {lanes}, ScalarType::Int);
    const W* p_weight = static_cast<const W*>(weight.const_data_ptr());
    const Memory memory{
        static_cast<int8_t*>(quantised.mutable_data_ptr()), static_cast<float*>(bounds.mutable_data_ptr()),
        static_cast<int32_t*>(shift.mutable_data_ptr()), lanes};
    torch::stable::parallel_for(0, blocks, grain(kernels.words * depth * 8), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kernels.words, last = std::min(vocab_size, end * kernels.words);
      quantise(kernels, p_weight, stride, first, last, hidden_size, depth, memory, first);
    });
  });
  return {quantised, bounds, shift};
}

// A chunk of tokens and the sequence that it belongs to.
struct Chunk {
  int64_t sequence;
  Tokens tokens;
};

// Writes the largest dot of every (sequence, word) that may exceed -bias, and the position of the token that attains
// it, to the rows `sequences` of largest and argmax; -inf and 0 where no dot may. Returns how many dots it computed. If
// the quantised words are not passed in, each strip is quantised right before it is used.
int64_t screened_maximum(
    Tensor rows, Tensor offsets, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> quantised,
    std::optional<Tensor> bounds, std::optional<Tensor> shift, Tensor sequences, Tensor positions, Tensor largest,
    std::optional<Tensor> argmax, std::string instruction_set) {
  check_weight(weight);
  const int64_t vocab_size = weight.size(0), hidden_size = weight.size(1), stride = weight.stride(0);
  const int64_t depth = divide_up(hidden_size, kDepthStep) * kDepthStep;
  STD_TORCH_CHECK(
      rows.dim() == 2 && rows.size(1) == hidden_size && rows.is_contiguous() &&
          rows.scalar_type() == ScalarType::Float,
      "rows: expected contiguous float32 [R, D]");
  STD_TORCH_CHECK(
      offsets.dim() == 1 && offsets.size(0) > 0 && offsets.is_contiguous() &&
          offsets.scalar_type() == ScalarType::Long,
      "offsets: expected contiguous int64 [n + 1]");
  const int64_t n = offsets.size(0) - 1;
  const auto* p_offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
  for (int64_t b = 0; b < n; ++b) {
    STD_TORCH_CHECK(
        0 <= p_offsets[b] && p_offsets[b] <= p_offsets[b + 1] && p_offsets[b + 1] <= rows.size(0) &&
            p_offsets[b + 1] - p_offsets[b] <= std::numeric_limits<int32_t>::max(),
        "offsets: expected to rise from 0 to at most R");
  }

  STD_TORCH_CHECK(
      sequences.dim() == 1 && sequences.size(0) == n && sequences.is_contiguous() &&
          sequences.scalar_type() == ScalarType::Long,
      "sequences: expected contiguous int64 [n]");
  STD_TORCH_CHECK(
      positions.dim() == 1 && positions.size(0) >= p_offsets[n] && positions.is_contiguous() &&
          positions.scalar_type() == ScalarType::Long,
      "positions: expected contiguous int64 [R]");
  STD_TORCH_CHECK(
      largest.dim() == 2 && largest.size(1) == vocab_size && largest.stride(1) == 1 &&
          largest.scalar_type() == ScalarType::Float,
      "largest: expected float32 [B, V] without gaps in its rows");
  STD_TORCH_CHECK(
      !argmax.has_value() ||
          (argmax->dim() == 2 && argmax->size(0) == largest.size(0) && argmax->size(1) == vocab_size &&
           argmax->stride(1) == 1 &&
           (argmax->scalar_type() == ScalarType::Short || argmax->scalar_type() == ScalarType::Int)),
      "argmax: expected int16 or int32 [B, V] without gaps in its rows");
  const auto* p_sequences = static_cast<const int64_t*>(sequences.const_data_ptr());
  const auto* p_positions = static_cast<const int64_t*>(positions.const_data_ptr());
  for (int64_t b = 0; b < n; ++b) {
    STD_TORCH_CHECK(
        0 <= p_sequences[b] && p_sequences[b] < largest.size(0), "sequences: expected rows of largest, got ",
        p_sequences[b]);
  }

  std::atomic<int64_t> evaluated{0};
  with_kernels(instruction_set, weight.scalar_type(), [&]<class W>(const Kernels<W>& kernels) {
    const int64_t lanes = divide_up(vocab_size, kernels.words) * kernels.words;
    const bool prepared = quantised.has_value() && bounds.has_value() && shift.has_value();
    STD_TORCH_CHECK(
        !prepared || (quantised->numel() == lanes * depth && bounds->numel() == 3 * lanes && shift->numel() == lanes),
        "quantised, bounds, shift: expected those of this weight for this instruction set");
    const Memory whole =
        prepared ? Memory{
                       static_cast<int8_t*>(quantised->mutable_data_ptr()),
                       static_cast<float*>(bounds->mutable_data_ptr()),
                       static_cast<int32_t*>(shift->mutable_data_ptr()), lanes}
                 : Memory{};
    std::vector<float> threshold(static_cast<size_t>(lanes), 0.0F);
    if (bias.has_value()) {
      STD_TORCH_CHECK(
          bias->dim() == 1 && bias->size(0) == vocab_size && bias->is_contiguous() &&
              bias->scalar_type() == ScalarType::Float,
          "bias: expected contiguous float32 [V]");
      const auto* p_bias = static_cast<const float*>(bias->const_data_ptr());
      std::transform(p_bias, p_bias + vocab_size, threshold.begin(), [](float c) { return -c; });
    }

    const int64_t count = rows.size(0);
    const auto* p_rows = static_cast<const float*>(rows.const_data_ptr());
    std::vector<uint8_t> tokens(static_cast<size_t>(count * depth));
    std::vector<Bounds> token_bounds(static_cast<size_t>(count));
    torch::stable::parallel_for(0, count, grain(depth * 8), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        token_bounds[static_cast<size_t>(t)] =
            kernels.quantise_token(p_rows + t * hidden_size, hidden_size, depth, tokens.data() + t * depth);
      }
    });
    std::vector<Chunk> chunks;
    for (int64_t b = 0; b < n; ++b) {
      for (int64_t t = p_offsets[b]; t < p_offsets[b + 1]; t += kChunk) {
        chunks.push_back(
            {b,
             {p_rows + t * hidden_size, tokens.data() + t * depth, token_bounds.data() + t,
              std::min(kChunk, p_offsets[b + 1] - t), static_cast<int32_t>(t - p_offsets[b])}});
      }
    }

    const W* p_weight = static_cast<const W*>(weight.const_data_ptr());
    auto* p_largest = static_cast<float*>(largest.mutable_data_ptr());
    const auto write_positions = [&]<class Position>(Position* out, const int32_t* winners, int64_t b, int64_t count) {
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Position>(p_positions[p_offsets[b] + winners[i]]);
    };
    const int64_t strips = divide_up(vocab_size, kStrip), step = grain(count * depth * kStrip);
    torch::stable::parallel_for(0, strips, step, [&](int64_t begin, int64_t end) {
      std::vector<int8_t> blocks(prepared ? 0 : static_cast<size_t>(kStrip * depth));
      std::vector<float> word_bounds(3 * kStrip);
      std::vector<int32_t> word_shift(kStrip);
      const Memory own{blocks.data(), word_bounds.data(), word_shift.data(), kStrip};
      // The best of one strip so far, which the chunks of a sequence update in turn.
      std::vector<float> values(static_cast<size_t>(n * kStrip));
      std::vector<int32_t> winners(static_cast<size_t>(n * kStrip));
      int64_t found = 0;
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t first = strip * kStrip, last = std::min(vocab_size, first + kStrip);
        if (!prepared) quantise(kernels, p_weight, stride, first, last, hidden_size, depth, own, 0);
        std::fill(values.begin(), values.end(), -std::numeric_limits<float>::infinity());
        std::fill(winners.begin(), winners.end(), 0);
        for (const Chunk& chunk : chunks) {
          for (int64_t v = first; v < last; v += kernels.words) {
            const Words words = prepared ? whole.at(v, depth) : own.at(v - first, depth);
            const int64_t place = chunk.sequence * kStrip + v - first;
            found += kernels.maximise_block(
                chunk.tokens, hidden_size, depth, words, threshold.data() + v, p_weight + v * stride, stride,
                std::min<int64_t>(kernels.words, last - v), values.data() + place, winners.data() + place);
          }
        }
        for (int64_t b = 0; b < n; ++b) {
          const float* from = values.data() + b * kStrip;
          std::copy(from, from + (last - first), p_largest + p_sequences[b] * largest.stride(0) + first);
          if (!argmax.has_value()) continue;
          const int64_t place = p_sequences[b] * argmax->stride(0) + first;
          const int32_t* won = winners.data() + b * kStrip;
          if (argmax->scalar_type() == ScalarType::Short) {
            write_positions(static_cast<int16_t*>(argmax->mutable_data_ptr()) + place, won, b, last - first);
          } else {
            write_positions(static_cast<int32_t*>(argmax->mutable_data_ptr()) + place, won, b, last - first);
          }
        }
      }
      evaluated += found;
    });
  });
  return evaluated.load();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(splade_kernels_csrc, CPU, library) {
  library.impl("quantise_words", TORCH_BOX(&quantise_words));
  library.impl("screened_maximum", TORCH_BOX(&screened_maximum));
}

STABLE_TORCH_LIBRARY_IMPL(splade_kernels_csrc, CompositeExplicitAutograd, library) {
  library.impl("instruction_sets", TORCH_BOX(&instruction_sets));
}

}  // namespace splade_kernels::cpu
