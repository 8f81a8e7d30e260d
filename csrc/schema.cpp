// The operators. Their fakes and their plain PyTorch counterparts: splade_kernels/backends/compaction.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(splade_kernels_csrc, library) {
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
  // CPU only, docs/screening.md: the instruction set there are screening kernels for (0: none), the int8 form of a
  // weight, and the maxima over the tokens of each sequence, with the number of dots they took.
  library.def("screening_isa() -> int");
  library.def("quantise_words(Tensor weight, int isa) -> (Tensor quantised, Tensor bounds, Tensor shift)");
  library.def(
      "screened_maximum(Tensor rows, Tensor offsets, Tensor weight, Tensor? bias, Tensor? quantised, Tensor? bounds,"
      " Tensor? shift, Tensor sequences, Tensor positions, Tensor(a!) largest, Tensor(b!)? argmax, int isa) -> int");
}
