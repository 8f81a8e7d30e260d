"""Encode a corpus on a Ray cluster, or with the processes of one machine: JSON lines or Parquet in, Parquet out.

Every worker is an actor that holds the model. If one dies, Ray Data starts another and gives it the batches that were
in flight, so that each row is written once. An error of the data or of the model ends the run. Rows are written in the
order in which they become ready; ``--in-order`` keeps the input's order, at the price of holding what is ready early.

    python -m examples.encode_ray --model naver/splade-v3 --input corpus.jsonl --output vectors --workers 4
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from examples import engine_options
from splade_kernels.encoding import EncodeBatch


def encode(
    texts: ray.data.Dataset, *, workers: int, rows: int, cpus: int, gpus: float, **options: Any
) -> ray.data.Dataset:
    """The dataset ``id``, ``indices``, ``values`` of the texts; ``options`` are those of EncodeBatch."""
    return texts.map_batches(
        EncodeBatch,
        fn_constructor_kwargs=options,
        batch_format="pyarrow",
        batch_size=rows,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=cpus,  # of an actor; Ray sets OMP_NUM_THREADS to it, and that is PyTorch's number of threads
        num_gpus=gpus,
        # A worker that dies is started again, and its batches are computed again, however often: Ray Data's defaults.
        max_restarts=-1,
        max_task_retries=-1,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = engine_options.parser(__doc__)
    parser.add_argument("--address", help="of a running cluster (default: that of RAY_ADDRESS, else this machine)")
    parser.add_argument("--workers", type=int, default=1, help="actors, each with a model (default: 1)")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs and threads of a worker (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a worker (default: 0)")
    parser.add_argument("--rows", type=int, default=1024, help="texts of a batch (default: 1024)")
    parser.add_argument("--in-order", action="store_true", help="write the rows in the order of the input")
    args = parser.parse_args(arguments)
    ray.init(address=args.address, include_dashboard=False, ignore_reinit_error=True)
    try:
        ray.data.DataContext.get_current().execution_options.preserve_order = args.in_order
        read = {"json": ray.data.read_json, "parquet": ray.data.read_parquet}[args.format]
        resources = {"workers": args.workers, "rows": args.rows, "cpus": args.cpus, "gpus": args.gpus}
        vectors = encode(read(args.input), **resources, **engine_options.of_encode_batch(args))
        vectors.write_parquet(args.output)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
