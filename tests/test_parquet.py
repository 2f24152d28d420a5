"""Quantized models in Parquet."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu import reference
from arrowquant_gpu.errors import FormatError, SourceError
from arrowquant_gpu.formats import TensorInfo, parquet
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.parquet import ParquetCheckpoint, ParquetSink
from arrowquant_gpu.formats.quantized import open_quantized
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .row_files import PROVENANCE, SOURCE, Model, RowFileTests, small_model


class TestParquet(RowFileTests):
    suffix = ".parquet"
    sink = ParquetSink
    checkpoint = ParquetCheckpoint

    @staticmethod
    def read_batches(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
        file = pq.ParquetFile(path)
        batches = [b for i in range(file.num_row_groups) for b in file.read_row_group(i).to_batches()]
        return file.schema_arrow, batches

    @staticmethod
    def write_batches(
        path: Path, schema: pa.Schema, batches: list[pa.RecordBatch], compression: str | None = None
    ) -> None:
        options = {"use_dictionary": False, "write_statistics": ["layer_name"], "data_page_size": 2**31 - 1}
        with pq.ParquetWriter(path, schema, compression=compression or "none", **options) as writer:
            for batch in batches:
                writer.write_table(pa.Table.from_batches([batch]))

    @given(st.data())
    def test_any_cutting_comes_back(self, data: st.DataObject) -> None:
        self.check_any_cutting(data)

    def test_int4_decodes_with_five_lines_of_numpy(self, tmp_path: Path) -> None:
        x = np.random.default_rng(2).standard_normal((12, 320)).astype(np.float32)
        model = Model()
        model.quantized("w", x, "int4_g64_asym_bf16")
        row = pq.read_table(self.write(tmp_path / "m.parquet", model)).to_pylist()[0]

        rows, length = row["shape"]
        data = np.frombuffer(row["data"], np.uint8).reshape(rows, -1)
        codes = np.stack([data & 15, data >> 4], axis=-1).reshape(rows, -1, row["group_size"])
        scales, zeros = (np.array(row[k]).reshape(rows, -1, 1) for k in ("scales", "zero_points"))
        weights = ((codes.astype("f4") - zeros.astype("f4")) * scales.astype("f4")).reshape(rows, length)

        q = model.want["w"]
        assert_bitwise_equal(weights, reference.dequantize(q.packed, q.scales, q.zeros, q.scheme, length))

    def test_a_row_group_is_found_by_the_statistics_of_its_name(self, file: Path) -> None:
        metadata = pq.read_metadata(file)
        assert metadata.num_row_groups == metadata.num_rows > len(small_model().entries)
        for i in range(metadata.num_row_groups):
            columns = {c.path_in_schema: c for c in map(metadata.row_group(i).column, range(metadata.num_columns))}
            name = columns.pop("layer_name")
            assert name.statistics.min == name.statistics.max
            assert {c.statistics for c in columns.values()} == {None}
            assert not any(c.has_dictionary_page for c in columns.values())
        found = pq.read_table(file, columns=["layer_name", "chunk"], filters=[("layer_name", "=", "a.weight")])
        assert found["chunk"].to_pylist() == [0, 1, 2]

    def test_values_that_are_not_where_the_footer_says_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        skeleton, model = parquet._ParquetSkeleton, Model()
        model.quantized("w", np.zeros((64, 512), np.float32), "int4_g32")
        values = skeleton._values

        def shifted(self: Any, data: Any) -> int:
            n = values(self, data)
            self._passed = {(self.size, length) for _, length in self._passed}
            return n

        output = Output(tmp_path / "m.parquet", is_directory=False)
        output.begin()
        monkeypatch.setattr(skeleton, "_values", shifted)
        with pytest.raises(FormatError, match="lays files out in a way that arrowquant does not know"):
            ParquetSink(output).open(model.entries, SOURCE, PROVENANCE)
        output.abort()

    def test_a_row_of_weights_that_is_too_long_for_parquet_is_refused(self) -> None:
        sink, four = ParquetSink(Output("/m.parquet", is_directory=False)), Scheme.parse("int4_g128")
        info = TensorInfo("w", "bfloat16", (1, 1 << 31), Path("m"), 0, 1 << 32)
        assert sink.scheme_for(info, four) == four
        for length, scheme in ((1 << 32, "int4_g128"), (1 << 31, "int8_channel"), (1 << 29, "int2_g1")):
            with pytest.raises(FormatError, match=f"{length:,} weights is more than the 2 GiB"):
                sink.scheme_for(dataclasses.replace(info, shape=(1, length)), Scheme.parse(scheme))

    def test_one_row_group_of_all_rows_is_refused(self, file: Path) -> None:
        pq.write_table(pq.read_table(file), file)
        with pytest.raises(SourceError, match="must be a row group of its own"):
            open_quantized(file)
