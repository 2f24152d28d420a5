"""Quantized models in Arrow IPC files."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu.errors import SourceError
from arrowquant_gpu.formats.arrow_ipc import ArrowCheckpoint, ArrowSink
from arrowquant_gpu.formats.quantized import open_quantized

from .row_files import RowFileTests, assert_same, small_model


class TestArrowIpc(RowFileTests):
    suffix = ".arrow"
    sink = ArrowSink
    checkpoint = ArrowCheckpoint

    @staticmethod
    def read_batches(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
        reader = pa.ipc.open_file(path.read_bytes())
        return reader.schema, [reader.get_batch(i) for i in range(reader.num_record_batches)]

    @staticmethod
    def write_batches(
        path: Path, schema: pa.Schema, batches: list[pa.RecordBatch], compression: str | None = None
    ) -> None:
        with pa.ipc.new_file(path, schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            for batch in batches:
                writer.write_batch(batch)

    @given(st.data())
    def test_any_cutting_comes_back(self, data: st.DataObject) -> None:
        self.check_any_cutting(data)

    def test_blocks_are_views_of_the_mapped_file(self, tmp_path: Path) -> None:
        file = self.write(tmp_path / "m.arrow", small_model())
        before = pa.total_allocated_bytes()
        checkpoint = open_quantized(file)
        blocks = {name: next(checkpoint.blocks(name))[1] for name in ("a.weight", "norm")}
        data = [blocks["a.weight"].packed, blocks["a.weight"].scales, blocks["a.weight"].zeros, blocks["norm"]]
        assert not any(a.flags.writeable for a in data)
        mapped = [
            (int(start, 16), int(stop, 16))
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(file))
            for start, stop in [line.split()[0].split("-")]
        ]
        for array in data:
            assert any(start <= array.ctypes.data < stop for start, stop in mapped)
        assert pa.total_allocated_bytes() - before < 4096

    def test_blocks_outlive_the_checkpoint_and_the_file(self, tmp_path: Path) -> None:
        file, model = self.write(tmp_path / "m.arrow", small_model()), small_model()
        blocks = list(open_quantized(file).blocks("a.weight"))
        file.unlink()
        gc.collect()
        assert_same(blocks, model.want["a.weight"], "a.weight")

    def test_data_are_aligned(self, file: Path) -> None:
        checkpoint = open_quantized(file)
        for _, block in checkpoint.blocks("norm"):
            assert block.flags.aligned
            assert block.dtype == np.float32

    def test_several_rows_in_a_batch_are_refused(self, file: Path) -> None:
        schema, batches = self.read_batches(file)
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_table(pa.Table.from_batches(batches).combine_chunks())
        with pytest.raises(SourceError, match="arrowquant writes one in each"):
            open_quantized(file)
