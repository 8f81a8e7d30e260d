// The operators. Their fakes: splade_kernels/backends/compiled.py; the same in PyTorch: compaction.py and tiled/ there.
#include <torch/csrc/stable/library.h>

namespace {

// Incremented whenever an operator is added, or its arguments or results change: compiled.py refuses a library built
// with another number.
int64_t schema_version() { return 3; }

}  // namespace

STABLE_TORCH_LIBRARY(splade_kernels_csrc, library) {
  library.def("schema_version() -> int");
  // Active entries (grad != 0, argmax inside its sequence) of each sequence by token, vocabulary ascending:
  // (bounds [rows, 2], words [n * V], values [n * V]).
  library.def(
      "bucket_by_token(Tensor argmax, Tensor grad, Tensor edges, SymInt rows)"
      " -> (Tensor bounds, Tensor words, Tensor values)");
  // CPU only, in one trip through memory: the CSR of exact size of what the next two find between them.
  library.def("sparsify(Tensor embeddings, SymInt count) -> (Tensor crow, Tensor col, Tensor values)");
  // The non-zeros among each row's `count` largest entries: how many [B], and which, a bit each [B, ceil(V / 32)].
  library.def("active_mask(Tensor embeddings, SymInt count) -> (Tensor counts, Tensor mask)");
  // Vocabulary ids and values of the entries in the mask; row b's begin at crow[b].
  library.def(
      "gather_active(Tensor embeddings, Tensor crow, Tensor mask, SymInt capacity) -> (Tensor col, Tensor values)");
  // CPU only, one pass over the vocabulary: dh [N, D] and dW [V, D] of the active entries, each in its parameter's dtype;
  // without rows where it is not needed.
  library.def(
      "max_pool_gradients(Tensor gradient, Tensor argmax, Tensor edges, Tensor hidden, Tensor weight, bool need_hidden,"
      " bool need_weight) -> (Tensor grad_hidden, Tensor grad_weight)");
  // CPU only, docs/screening.md: the instruction sets that there are screening kernels for and that this CPU has,
  // fastest first; the int8 form of a weight; the maxima over the tokens of each sequence, and how many dots were
  // computed for them. The last two run the kernels of the named instruction set.
  library.def("instruction_sets() -> str[]");
  library.def("quantise_words(Tensor weight, str instruction_set) -> (Tensor quantised, Tensor bounds, Tensor shift)");
  library.def(
      "screened_maximum(Tensor rows, Tensor offsets, Tensor weight, Tensor? bias, Tensor? quantised, Tensor? bounds,"
      " Tensor? shift, Tensor sequences, Tensor positions, Tensor(a!) largest, Tensor(b!)? argmax, str instruction_set)"
      " -> int");
}

STABLE_TORCH_LIBRARY_IMPL(splade_kernels_csrc, CompositeExplicitAutograd, library) {
  library.impl("schema_version", TORCH_BOX(&schema_version));
}
