"""Encode a corpus with Spark: JSON lines or Parquet in, Parquet out.

Each Python worker loads the model once and keeps it for all its partitions. A partition whose task fails is computed
again, and Spark writes its rows once. Needs Java 17.

    python -m examples.encode_spark --model naver/splade-v3 --input corpus.jsonl --output vectors
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

from pyarrow import RecordBatch
from pyspark.sql import DataFrame, SparkSession

from examples import engine_options
from splade_kernels.encoding import EncodeBatch

SCHEMA = "id string, indices array<int>, values array<float>"


def encode(texts: DataFrame, batch: EncodeBatch) -> DataFrame:
    """The rows ``id``, ``indices``, ``values`` of the texts."""

    def encode_all(batches: Iterator[RecordBatch]) -> Iterator[RecordBatch]:
        return map(batch, batches)

    return texts.mapInArrow(encode_all, SCHEMA)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = engine_options.parser(__doc__)
    parser.add_argument("--partitions", type=int, help="cut the input into so many (default: as Spark reads it)")
    args = parser.parse_args(arguments)
    batch = EncodeBatch(**engine_options.of_encode_batch(args))
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # of the workers
    spark = SparkSession.builder.appName("encode").getOrCreate()
    try:
        texts = spark.read.format(args.format).load(args.input)
        if args.partitions:
            texts = texts.repartition(args.partitions)
        encode(texts, batch).write.parquet(args.output)
    finally:
        spark.stop()


if __name__ == "__main__":
    main()
