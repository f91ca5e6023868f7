"""Data streams: rows of numbers in order, with a label each, in chunks.

| file | streams from |
| --- | --- |
| `synthetic` | generators, with concept drift at known places |
| `files` | CSV, ARFF and Parquet files |
| `rows` | any iterable of dictionaries: a queue, a generator |
| `named` | a name or a path |
"""

from moesaic.trees.streams.files import file_stream
from moesaic.trees.streams.named import open_stream, settings_of
from moesaic.trees.streams.rows import rows_stream
from moesaic.trees.streams.stream import Chunk, Drift, Stream
from moesaic.trees.streams.synthetic import synthetic

__all__ = ["Chunk", "Drift", "Stream", "file_stream", "open_stream", "rows_stream", "settings_of", "synthetic"]
