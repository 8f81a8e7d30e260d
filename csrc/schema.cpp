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
}
