"""Quantized tensors as Arrow rows: self-describing, and back without a copy."""

from __future__ import annotations

import io
import itertools
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arrowquant_gpu import arrow_columns, reference
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import InputError, SchemeError
from arrowquant_gpu.schemes import BITS, Scheme
from arrowquant_gpu.tensor import QuantizedTensor

from .bitwise import assert_bitwise_equal
from .producers import StreamProducer
from .quantized import EVERY_KIND, SHAPES, arrays, check_equal, quantized

# Lives as long as anything that was allocated in it, in the traceback of a failure too.
COUNTED = pa.proxy_memory_pool(pa.default_memory_pool())


def check_same_memory(got: QuantizedTensor, want: QuantizedTensor) -> None:
    for name, a in arrays(want).items():
        assert a.size == 0 or arrays(got)[name].ctypes.data == a.ctypes.data, f"{name} was copied"


def replaced(batch: pa.RecordBatch, column: str, value: Any, kind: pa.DataType | None = None) -> pa.RecordBatch:
    i = batch.schema.get_field_index(column)
    return batch.set_column(i, column, pa.array([value], kind or batch.schema.field(i).type))


class TestRow:
    def test_columns(self) -> None:
        kinds = {f.name: str(f.type) for f in arrow_columns.schema("float16")}
        assert kinds == {
            "layer_name": "string",
            "shape": "list<item: uint64>",
            "dtype": "string",
            "data": "large_binary",
            "num_params": "uint64",
            "quant_type": "string",
            "scales": "large_list<item: halffloat>",
            "zero_points": "large_list<item: uint8>",
            "quant_axis": "int32",
            "group_size": "uint32",
            "bit_width": "uint8",
            "scheme": "string",
            "chunk": "uint32",
            "n_chunks": "uint32",
            "row_offset": "uint64",
        }
        bf16 = arrow_columns.schema("bfloat16").field("scales").type.value_field
        assert (bf16.type, bf16.metadata) == (pa.uint16(), {b"arrowquant.dtype": b"bfloat16"})
        with pytest.raises(SchemeError, match="float64"):
            arrow_columns.schema("float64")

    @pytest.mark.parametrize("scheme", EVERY_KIND, ids=str)
    def test_both_ways_without_a_copy(self, scheme: Scheme) -> None:
        for shape in SHAPES:
            q = quantized(scheme, shape)
            batch = q.to_arrow("w")
            batch.validate(full=True)
            back = QuantizedTensor.from_arrow(batch)
            check_equal(back, q)
            check_same_memory(back, q)
            assert not any(a.flags.writeable for a in arrays(back).values() if a.size)
            name, read = arrow_columns.read(batch)
            assert name == "w"
            check_equal(read, q)

    def test_values(self) -> None:
        row = quantized("int3_g16_asym_bf16", (2, 3, 17)).to_arrow("block.0").to_pylist()[0]
        assert {k: v for k, v in row.items() if k not in ("data", "scales", "zero_points")} == {
            "layer_name": "block.0",
            "shape": [2, 3, 17],
            "dtype": "float16",
            "num_params": 102,
            "quant_type": "int3",
            "quant_axis": 2,
            "group_size": 16,
            "bit_width": 3,
            "scheme": "int3_g16_asym_bf16",
            "chunk": 0,
            "n_chunks": 1,
            "row_offset": 0,
        }
        assert (len(row["data"]), len(row["scales"]), len(row["zero_points"])) == (6 * 7, 6 * 2, 6 * 2)

    @pytest.mark.parametrize(
        ("scheme", "null"),
        [
            ("int8_channel", {"zero_points", "group_size"}),
            ("int8_tensor_asym", {"quant_axis", "group_size"}),
            ("int8_g16", {"zero_points"}),
        ],
    )
    def test_nulls(self, scheme: str, null: set[str]) -> None:
        row = quantized(scheme).to_arrow().to_pylist()[0]
        assert {k for k, v in row.items() if v is None} == null

    def test_a_row_and_its_metadata_are_enough_to_decode(self) -> None:
        """By hand, from the row alone, in the words of its metadata."""
        for bits in BITS:
            for suffix in ("", "_asym"):
                q = quantized(f"int{bits}_g16{suffix}", (3, 40))
                row = q.to_arrow().to_pylist()[0]
                rows, length = row["shape"]
                n_bytes, n_groups = len(row["data"]) // rows, len(row["scales"]) // rows
                got = np.empty((rows, length), np.float32)
                for r in range(rows):
                    stream = int.from_bytes(row["data"][r * n_bytes : (r + 1) * n_bytes], "little")
                    for k in range(length):
                        code = stream >> (k * bits) & ((1 << bits) - 1)
                        group = r * n_groups + k // row["group_size"]
                        zero = row["zero_points"][group] if row["zero_points"] else 2 ** (row["bit_width"] - 1)
                        got[r, k] = np.float32(code - zero) * np.float32(row["scales"][group])
                assert_bitwise_equal(got, reference.dequantize(q.packed, q.scales, q.zeros, q.scheme, length))

    def test_arrays_that_are_not_row_major_are_copied(self) -> None:
        q = quantized("int8_g16")
        f = QuantizedTensor(np.asfortranarray(q.packed), q.scales[:, ::1], None, q.shape, q.scheme, q.dtype)
        check_equal(QuantizedTensor.from_arrow(f.to_arrow()), q)

    def test_the_address_check_notices_a_copy(self) -> None:
        q = quantized()
        copied = QuantizedTensor(q.packed, q.scales.copy(), q.zeros, q.shape, q.scheme, q.dtype)
        with pytest.raises(AssertionError, match="scales was copied"):
            check_same_memory(QuantizedTensor.from_arrow(copied.to_arrow()), q)

    def test_more_than_two_gigabytes(self, tmp_path: Any) -> None:
        """Codes and scales past every 32-bit limit, over sparse files that are never read."""
        n = (1 << 31) + 5
        packed = self.sparse(tmp_path / "packed", n, np.uint8).reshape(1, n)
        scales = self.sparse(tmp_path / "scales", n, np.float32).reshape(1, n)
        q = QuantizedTensor(packed, scales, None, (n,), Scheme.parse("int8_g1"), "float32")
        batch = q.to_arrow("huge")
        assert batch["num_params"][0].as_py() == n
        assert len(batch["scales"].flatten()) == n
        back = QuantizedTensor.from_arrow(
            pa.concat_tables([pa.table(quantized("int8_g1").to_arrow()), pa.table(batch)]), 1
        )
        assert (back.shape, back.packed.shape, back.scales.shape) == ((n,), (1, n), (1, n))
        check_same_memory(back, q)

    @staticmethod
    def sparse(path: Any, n: int, dtype: Any) -> np.ndarray:
        with path.open("wb") as f:
            f.truncate(n * np.dtype(dtype).itemsize)
        return np.memmap(path, dtype, "r")


class TestRead:
    @pytest.mark.parametrize("suffix", ["", "_f16", "_bf16"])
    def test_from_files(self, suffix: str) -> None:
        """Native scales through IPC, float32 scales through Parquet, several rows, any one of them."""
        tensors = [quantized(f"int{bits}_g16_asym{suffix}", (bits, 40)) for bits in BITS]
        native = pa.Table.from_batches([q.to_arrow(str(i)) for i, q in enumerate(tensors)])
        wide = pa.Table.from_batches(
            [arrow_columns.row(str(i), q, scale_dtype="float32") for i, q in enumerate(tensors)]
        )
        assert wide.schema.equals(arrow_columns.schema("float32"), check_metadata=True)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, native.schema) as writer:
            writer.write_table(native)
        from_ipc = pa.ipc.open_file(sink.getvalue()).read_all()
        assert from_ipc.schema.equals(native.schema, check_metadata=True)
        file = io.BytesIO()
        pq.write_table(wide, file, compression="zstd")
        from_parquet = pq.read_table(file)
        for table in (native, wide, from_ipc, from_parquet, native.combine_chunks(), wide[1:]):
            for i in range(table.num_rows):
                want = tensors[i + len(tensors) - table.num_rows]
                check_equal(QuantizedTensor.from_arrow(table, i), want)

    def test_ipc_is_read_in_place(self) -> None:
        q = quantized()
        sink = pa.BufferOutputStream()
        batch = q.to_arrow()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        whole = sink.getvalue()
        back = QuantizedTensor.from_arrow(pa.ipc.open_stream(whole).read_next_batch())
        for name, a in arrays(back).items():
            assert whole.address <= a.ctypes.data < whole.address + whole.size, f"{name} was copied"

    def test_other_producers(self) -> None:
        import nanoarrow as na

        q = quantized()
        for made in (StreamProducer(pa.table(q.to_arrow())), na.Array(q.to_arrow())):
            back = QuantizedTensor.from_arrow(made)
            check_equal(back, q)
            check_same_memory(back, q)
        with pytest.raises(InputError, match=r"builtins\.list is no Arrow table"):
            QuantizedTensor.from_arrow([1])

    @pytest.mark.parametrize(
        "kinds",
        [
            {"layer_name": pa.large_string(), "data": pa.binary(), "shape": pa.large_list(pa.int64())},
            {"data": pa.binary_view(), "scheme": pa.string_view(), "dtype": pa.string_view()},
            {"scales": pa.list_(pa.float32()), "zero_points": pa.list_(pa.uint8())},
            {"scales": pa.list_(pa.float32(), 9), "zero_points": pa.list_(pa.uint8(), 9)},
        ],
    )
    def test_other_types_of_the_same_columns(self, kinds: dict[str, pa.DataType]) -> None:
        q = quantized()
        table = pa.Table.from_batches([q.to_arrow("a"), q.to_arrow("b")])
        for name, kind in kinds.items():
            i = table.schema.get_field_index(name)
            table = table.set_column(i, name, pa.chunked_array([pa.array(table[name].to_pylist(), kind)]))
        for i in (0, 1):
            check_equal(QuantizedTensor.from_arrow(table, i), q)

    def test_columns_that_may_be_missing_and_columns_of_others(self) -> None:
        q = quantized()
        table = pa.table(q.to_arrow()).replace_schema_metadata(None).append_column("reason", [["why"]])
        table = table.drop(["layer_name", "num_params", "quant_type", "quant_axis", "group_size", "bit_width"])
        table = table.drop(["chunk", "n_chunks", "row_offset"])
        check_equal(QuantizedTensor.from_arrow(table), q)

    @pytest.mark.parametrize("scheme", ["int4_g16_asym", "int3_channel_f16", "int8_tensor_bf16"])
    @pytest.mark.parametrize("list_of", [pa.list_, pa.large_list])
    def test_rows_of_a_table_of_results(self, scheme: str, list_of: Any) -> None:
        """quantized_data for data, a signed shape, scales and zero points in lists of either width."""
        want = [quantized(scheme, (3, 40)), quantized(scheme, (7, 21))]
        scales = [q.scales.astype(np.float32).ravel().tolist() for q in want]
        zeros = [None if q.zeros is None else q.zeros.ravel().tolist() for q in want]
        table = pa.table(
            {
                "layer_name": pa.array(["a", "b"], pa.large_string()),
                "quantized_data": pa.array([q.packed.tobytes() for q in want], pa.large_binary()),
                "scales": pa.array(scales, list_of(pa.float32())),
                "zero_points": pa.array(zeros, list_of(pa.uint8())),
                "shape": pa.array([q.shape for q in want], pa.list_(pa.int64())),
                "bit_width": pa.array([q.scheme.bits for q in want], pa.uint8()),
                "scheme": [q.scheme.id for q in want],
                "dtype": [q.dtype for q in want],
            }
        )
        for i, q in enumerate(want):
            check_equal(QuantizedTensor.from_arrow(table, i), q)
        found = list(arrow_columns.read_all(table))
        assert [name for name, _ in found] == ["a", "b"]
        for (_, tensor), q in zip(found, want, strict=True):
            check_equal(tensor, q)

    def test_both_names_of_the_codes_are_refused(self) -> None:
        batch = quantized().to_arrow("w")
        both = batch.append_column("quantized_data", batch["data"])
        with pytest.raises(InputError, match="a column data and a column quantized_data"):
            arrow_columns.read(both)

    def test_two_columns_of_one_name_are_refused(self) -> None:
        batch = quantized().to_arrow("w")
        with pytest.raises(InputError, match="two columns of one name"):
            arrow_columns.read(batch.append_column("scales", batch["scales"]))

    def test_all_rows_in_their_own_batches(self) -> None:
        """Of a table of several batches every row is read once, in order, in place, and named by its number."""
        want = [quantized("int4_g16_asym", (n, 40)) for n in range(1, 8)]
        rows = [q.to_arrow(f"w{i}") for i, q in enumerate(want)]
        empty = rows[0].slice(0, 0)
        table = pa.Table.from_batches([rows[0], pa.concat_batches(rows[1:4]), empty, pa.concat_batches(rows[4:])])
        found = list(arrow_columns.read_all(table))
        assert [name for name, _ in found] == [f"w{i}" for i in range(7)]
        for (_, tensor), q in zip(found, want, strict=True):
            check_equal(tensor, q)
        check_same_memory(found[0][1], want[0])
        torn = pa.Table.from_batches([*rows[:5], replaced(rows[5], "data", b"x")])
        with pytest.raises(InputError, match=r"^row 5 \(w5\): data has 1 items"):
            list(arrow_columns.read_all(torn))

    def test_a_row_costs_what_it_holds(self) -> None:
        """Columns of a type that must be converted are converted row by row, never as a whole."""
        q = quantized("int4_g16_asym", (64, 256))
        table = pa.Table.from_batches([q.to_arrow(str(i)) for i in range(200)]).combine_chunks()
        i = table.schema.get_field_index("data")
        table = table.set_column(i, "data", table["data"].cast(pa.binary_view()))

        def read() -> None:
            for _, tensor in arrow_columns.read_all(table):
                check_equal(tensor, q)
            arrow_columns.read(table, 199)

        default = pa.default_memory_pool()
        pa.set_memory_pool(COUNTED)
        try:
            read()
        finally:
            pa.set_memory_pool(default)
        assert 0 < COUNTED.max_memory() < 4 * q.packed.nbytes

    def test_bfloat16_scales_without_their_mark(self) -> None:
        q = quantized("int4_g16_bf16")
        batch = q.to_arrow()
        bare = replaced(batch, "scales", batch["scales"][0].as_py(), pa.large_list(pa.uint16()))
        check_equal(QuantizedTensor.from_arrow(bare), q)

    @pytest.mark.parametrize("scheme", ["int4_g16", "int4_g16_asym_f16", "int4_channel", "int4_tensor_asym"])
    def test_pieces(self, scheme: str) -> None:
        """A tensor cut into rows of the table: each decodes alone to its rows of weights."""
        q = quantized(scheme, (2, 4, 40))
        whole = reference.dequantize(q.packed, q.scales, q.zeros, q.scheme, 40)
        cuts = [0, 3, 4, 8]
        batches = []
        for i, (a, b) in enumerate(itertools.pairwise(cuts)):
            rows = slice(None) if q.scheme.granularity == "tensor" else slice(a, b)
            zeros = None if q.zeros is None else q.zeros[rows]
            piece = QuantizedTensor(q.packed[a:b], q.scales[rows], zeros, (b - a, 40), q.scheme, q.dtype)
            batches.append(arrow_columns.row("w", piece, shape=q.shape, chunk=i, n_chunks=3, row_offset=a))
        table = pa.Table.from_batches(batches)
        for i, (a, b) in enumerate(itertools.pairwise(cuts)):
            row = table.slice(i, 1).to_pylist()[0]
            assert (row["shape"], row["num_params"], row["chunk"], row["n_chunks"]) == ([2, 4, 40], 320, i, 3)
            piece = QuantizedTensor.from_arrow(table, i)
            assert piece.shape == (b - a, 40)
            assert row["row_offset"] == a
            got = reference.dequantize(piece.packed, piece.scales, piece.zeros, piece.scheme, 40)
            assert_bitwise_equal(got, whole[a:b])
            assert np.shares_memory(piece.packed, q.packed)

    @pytest.mark.parametrize("dtype", [d.name for d in DTYPES.values() if d.numpy is not None])
    def test_copied_tensors(self, dtype: str) -> None:
        x = np.arange(48, dtype=np.uint8).view(DTYPES[dtype].numpy).reshape(3, -1)
        batch = arrow_columns.copied_row("norm", x, x.shape, dtype)
        batch.validate(full=True)
        name, back = arrow_columns.read(batch)
        assert (name, batch["quant_type"][0].as_py(), batch["scheme"][0].as_py()) == ("norm", "none", None)
        assert_bitwise_equal(back, x)
        assert back.ctypes.data == x.ctypes.data
        with pytest.raises(InputError, match=r"row 0 \(norm\): quant_type none, this tensor is not quantized"):
            QuantizedTensor.from_arrow(batch)
        piece = arrow_columns.copied_row("norm", x[1:], x.shape, dtype, chunk=1, n_chunks=2, row_offset=1)
        assert_bitwise_equal(arrow_columns.read(piece)[1], x[1:])

    def test_copied_bytes_of_a_type_that_numpy_lacks(self) -> None:
        x = np.arange(6, dtype=np.uint8)
        assert_bitwise_equal(arrow_columns.read(arrow_columns.copied_row("w", x, (3, 4), "float4_e2m1fn"))[1], x)

    REFUSED: ClassVar = {
        "missing columns": (lambda b: b.drop_columns(["data", "scheme"]), "columns data, scheme are missing"),
        "a later version": (
            lambda b: b.replace_schema_metadata({"arrowquant.version": "2"}),
            "columns of version 2: this package reads version 1; update it",
        ),
        "null data": (lambda b: replaced(b, "data", None), r"row 0 \(w\): data is null"),
        "null shape": (lambda b: replaced(b, "shape", None), r"row 0 \(w\): shape is null"),
        "a negative size": (
            lambda b: replaced(b, "shape", [-3, -40], pa.list_(pa.int64())),
            r"\(w\): shape \[-3, -40\] has a null or a negative size",
        ),
        "a null size": (lambda b: replaced(b, "shape", [3, None]), r"\(w\): shape \[3, None\] has a null"),
        "null scales": (lambda b: replaced(b, "scales", None), r"row 0 \(w\): scales is null"),
        "null zero points": (lambda b: replaced(b, "zero_points", None), r"row 0 \(w\): zero_points is null"),
        "a null scale": (lambda b: replaced(b, "scales", [1.0, None]), r"row 0 \(w\): scales has 1 nulls"),
        "a short row": (lambda b: replaced(b, "data", b"x"), r"\(w\): data has 1 items; int4_g16_asym of .* has 60"),
        "few scales": (lambda b: replaced(b, "scales", [1.0]), r"\(w\): scales has 1 items; .* has 9"),
        "few zero points": (lambda b: replaced(b, "zero_points", [1]), r"\(w\): zero_points has 1 items; .* has 9"),
        "another shape": (lambda b: replaced(b, "shape", [3, 41]), r"\(w\): data has 60 items; .*\[3, 41\] has 63"),
        "another width": (lambda b: replaced(b, "bit_width", 8), r"bit_width is 8 and the scheme is int4_g16_asym"),
        "another group": (lambda b: replaced(b, "group_size", 32), r"group_size is 32 and the scheme is"),
        "another type": (lambda b: replaced(b, "quant_type", "int8"), r"quant_type is 'int8' and the scheme is"),
        "no scheme": (lambda b: replaced(b, "scheme", None), r"\(w\): quant_type 'int4' and no scheme"),
        "an unknown scheme": (lambda b: replaced(b, "scheme", "int4_g16x"), "'int4_g16x' is not a scheme"),
        "an unknown dtype": (lambda b: replaced(b, "dtype", "float9"), r"\(w\): dtype 'float9' is not known"),
        "wide zero points": (
            lambda b: replaced(b, "zero_points", [1] * 9, pa.list_(pa.int32())),
            r"\(w\): zero_points are int32; they must be uint8",
        ),
        "wide scales": (
            lambda b: replaced(b, "scales", [1.0] * 9, pa.list_(pa.float64())),
            r"\(w\): scales are float64; int4_g16_asym has float32, or float32",
        ),
        "symmetric with zero points": (
            lambda b: replaced(replaced(b, "scheme", "int4_g16"), "bit_width", 4),
            r"\(w\): zero_points is not null and the scheme int4_g16 is symmetric",
        ),
    }

    @pytest.mark.parametrize("what", REFUSED)
    def test_refused(self, what: str) -> None:
        change, words = self.REFUSED[what]
        with pytest.raises((InputError, SchemeError), match=words):
            QuantizedTensor.from_arrow(change(quantized().to_arrow("w")))

    @pytest.mark.parametrize("row", [-1, 1])
    def test_row_that_is_not_there(self, row: int) -> None:
        with pytest.raises(InputError, match=f"row {row}: the table has 1 rows"):
            QuantizedTensor.from_arrow(quantized().to_arrow(), row)

    def test_scales_that_do_not_narrow(self) -> None:
        q = quantized("int4_g16_f16")
        wide = q.scales.astype(np.float32).ravel()
        wide[4] = np.float32(0.1)
        batch = replaced(q.to_arrow("w"), "scales", wide.tolist(), pa.large_list(pa.float32()))
        with pytest.raises(
            InputError, match=r"1 scales are not float16 values.*the first is scale number 4, np\.float32"
        ):
            QuantizedTensor.from_arrow(batch)
        with pytest.raises(SchemeError, match="its float16 scales cannot be stored as bfloat16"):
            arrow_columns.row("w", q, scale_dtype="bfloat16")

    def test_copied_data_that_does_not_fit(self) -> None:
        batch = arrow_columns.copied_row("w", np.zeros(5, np.uint8), (3,), "float16")
        with pytest.raises(InputError, match=r"data has 5 bytes, which does not fit float16 \[3\]"):
            arrow_columns.read(batch)
