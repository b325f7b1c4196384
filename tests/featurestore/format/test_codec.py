"""Codecs: codes as faiss makes them, errors of at most half a step, what a store of codes takes and gives."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from featurestore import Codec, CodecSpec, FeaturePartition, FeatureRows, FeatureStore, StoreInfo, to_bits, to_float32
from featurestore.errors import CorruptFileError, InvalidRowsError, SpecMismatchError
from featurestore.format.codec import codec_of, write_codec
from featurestore.index import nearest, train_ranges
from featurestore.storage.storage import Storage
from featurestore.text import DType
from tests.featurestore.staged import build_shard

DIM = 24
ALL_DTYPES = ["bfloat16", "float16", "float32", "int8"]


def drawn(count: int = 900) -> np.ndarray:
    """Like what networks make: dimensions far from zero, after a ReLU, without any change, and small ones."""
    values = np.random.default_rng(3).standard_normal((count, DIM)).astype(np.float32)
    values[:, 0] += 50
    values[:, 1:4] = np.maximum(values[:, 1:4], 0)
    values[:, 4] = 0
    values[:, 5] = -2.7
    values[:, 6] *= 1e-20
    return values


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec("int8", train_ranges(drawn()))


@pytest.fixture
def int8_store(tmp_path: Path, info: StoreInfo, codec: Codec) -> FeatureStore:
    spec = write_codec(Storage(tmp_path / "int8"), codec)
    return FeatureStore.create(
        tmp_path / "int8", StoreInfo(**{**info.model_dump(), "dim": DIM, "dtype": "int8", "codec": spec})
    )


def faiss_of(codec: Codec) -> faiss.ScalarQuantizer:
    quantizer = faiss.ScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_8bit)
    faiss.copy_array_to_vector(codec.ranges_2D.reshape(-1), quantizer.trained)
    return quantizer


class TestCodes:
    def test_they_are_those_of_faiss(self, codec: Codec) -> None:
        values = np.concatenate([drawn(), 3 * drawn(), np.full((1, DIM), 3e38, np.float32)])  # far outside too
        codes = codec.encode(values)
        quantizer = faiss_of(codec)
        assert codes.dtype == np.uint8 and np.array_equal(codes, quantizer.compute_codes(values))
        rounding = 3e-7 * np.abs(codec.ranges_2D).sum(0)  # of float32
        assert (np.abs(codec.decode(codes) - quantizer.decode(codes)) <= rounding).all()

    def test_the_ranges_are_those_that_faiss_trains_half_a_step_lower(self, codec: Codec) -> None:
        quantizer = faiss.ScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_8bit)
        quantizer.train(drawn())
        minimum, width = faiss.vector_to_array(quantizer.trained).reshape(2, -1)
        np.testing.assert_allclose(codec.ranges_2D, [minimum - width / 510, width], rtol=1e-6)

    def test_no_number_in_range_is_off_by_more_than_half_a_step(self, codec: Codec) -> None:
        values = drawn()
        error = np.abs(codec.decode(codec.encode(values)).astype(np.float64) - values)
        assert (error <= 0.501 * codec.step_D + 1e-6 * np.abs(values)).all()
        for ends in (values.min(0), values.max(0)):  # faiss's own ranges would put them half a step off
            off = np.abs(codec.decode(codec.encode(ends[None]))[0] - ends)
            assert (off <= 1e-3 * codec.step_D + 1e-6 * np.abs(ends)).all()

    def test_zeros_of_a_relu_and_what_never_changes_stay(self, codec: Codec) -> None:
        values = drawn()
        kept = codec.decode(codec.encode(values))
        zeros = values[:, 1:4] == 0
        assert zeros.any() and np.abs(kept[:, 1:4][zeros]).max() < 1e-6
        assert np.array_equal(kept[:, 4:6], values[:, 4:6])
        assert (codec.step_D[4:6] == 0).all()
        other = values.copy()
        other[:, 4:6] = [7.0, -9.0]  # a dimension with one code has nothing else to say
        assert np.array_equal(codec.decode(codec.encode(other))[:, 4:6], values[:, 4:6])

    def test_what_lies_outside_is_counted(self, codec: Codec) -> None:
        values = drawn()
        assert codec.num_clipped(values) == 0
        values[3, 7] = 100
        values[4, 8] = -100
        values[5, 4] = 1  # of a dimension that was always 0
        assert codec.num_clipped(values) == 3
        kept = codec.decode(codec.encode(values))
        assert kept[3, 7] == pytest.approx(drawn()[:, 7].max()) and kept[4, 8] == pytest.approx(drawn()[:, 8].min())
        assert Codec("bfloat16").num_clipped(values) == 0

    def test_neighbours_are_the_exact_ones(self) -> None:
        values = drawn()
        distances = ((values[:20, None].astype(np.float64) - values[None, 20:]) ** 2).sum(2)
        assert np.array_equal(nearest(values[20:], values[:20], 10), np.argsort(distances, axis=1)[:, :10])


class TestEncode:
    @pytest.mark.parametrize("dtype", ALL_DTYPES)
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_is_refused_whatever_the_dtype(self, codec: Codec, dtype: DType, bad: float) -> None:
        of_dtype = codec if dtype == "int8" else Codec(dtype)
        values = drawn(5)
        values[2, 7] = bad
        with pytest.raises(InvalidRowsError, match=r"1 of 5 .* row 2"):
            of_dtype.encode(values)
        bits, storable = of_dtype.encode_storable(values)
        assert storable.tolist() == [True, True, False, True, True]
        assert np.array_equal(bits[storable], of_dtype.encode(drawn(5)[storable]))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_other_dtypes_are_bits(self, dtype: DType) -> None:
        bits = Codec(dtype).encode(drawn())
        assert np.array_equal(bits, to_bits(drawn(), dtype))
        assert np.array_equal(Codec(dtype).decode(bits), to_float32(bits, dtype))

    def test_no_rows_and_another_width(self, codec: Codec) -> None:
        assert codec.encode(np.empty((0, DIM), np.float32)).shape == (0, DIM)
        for work in (codec.encode, codec.decode):
            with pytest.raises(InvalidRowsError, match=rf"\(4, 3\), the store's codec is for \(N, {DIM}\)"):
                work(np.zeros((4, 3), np.uint8))

    def test_bits_without_a_codec_are_refused(self) -> None:
        for work in (to_bits, to_float32):
            with pytest.raises(InvalidRowsError, match="codec"):
                work(np.zeros((1, 2), np.uint8), "int8")


class TestStore:
    @pytest.mark.parametrize("dtype", ALL_DTYPES)
    def test_rows_may_come_as_float32(
        self, tmp_path: Path, info: StoreInfo, int8_store: FeatureStore, dtype: DType
    ) -> None:
        store = int8_store
        if dtype != "int8":
            other = info.model_copy(update={"dim": DIM, "dtype": dtype})
            store = FeatureStore.create(tmp_path / dtype, other)
        values = drawn(40)
        rows = FeatureRows.of([f"{i}" for i in range(40)], values)
        expected = store.codec.encode(values)
        assert np.array_equal(store.put(rows).get(rows.keys_N), expected)
        store.put(FeatureRows.of(rows.uris, expected))  # or as the store keeps them
        store.stage_part("run", "part", rows)
        entry = build_shard(store, "run", 3, ["part"])
        assert entry is not None
        snapshot = store.commit({3: entry}, "extract")
        assert np.array_equal(snapshot.get(rows.keys_N), expected)
        values[7, 3] = np.nan
        with pytest.raises(InvalidRowsError, match=rf"1 of 40 features are not finite.*key {rows.keys_N[7]} \('7'\)"):
            store.put(FeatureRows.of(rows.uris, values))

    def test_replaced_and_deleted_rows_statistics_and_lookups(self, int8_store: FeatureStore, tmp_path: Path) -> None:
        store, values = int8_store, drawn(300)
        rows = FeatureRows.of([f"{i}" for i in range(300)], values)
        store.put(rows)
        store.put(FeatureRows.of(rows.uris[:50], values[50:100]))
        store.delete(rows.keys_N[200:210])
        values[:50] = values[50:100]
        live = np.r_[0:200, 210:300]
        snapshot = store.snapshot()
        codes = snapshot.get(rows.keys_N[live])
        assert np.array_equal(codes, store.codec.encode(values[live]))
        decoded = snapshot.codec.decode(codes).astype(np.float64)
        statistics = snapshot.statistics()
        assert statistics.count == 290
        rounding = 1e-7 * np.abs(decoded).max(0)  # of float32
        assert (np.abs(statistics.mean_D - decoded.mean(0)) <= rounding).all()
        assert (np.abs(statistics.std_D - decoded.std(0)) <= rounding).all()
        with FeaturePartition.load(store, cache_dir=tmp_path / "cache", missing="zeros") as partition:
            found = partition.lookup(rows.keys_N)
            assert found.features_UD.dtype == np.uint8 and partition.dtype == "int8"
            assert np.array_equal(found.features_UD[live], codes)
            assert np.array_equal(np.flatnonzero(found.missing_U), np.arange(200, 210))
            assert np.array_equal(partition.codec.decode(codes), snapshot.codec.decode(codes))

    def test_codes_of_two_codecs_never_mix(self, int8_store: FeatureStore, tmp_path: Path) -> None:
        other = Codec("int8", train_ranges(2 * drawn()))
        info = int8_store.info.model_copy(update={"codec": write_codec(Storage(tmp_path / "other"), other)})
        twin = FeatureStore.create(tmp_path / "other", info)
        twin.stage_part("run", "part", FeatureRows.of(["a"], drawn(1)))
        shard = next(shard for shard in range(8) if build_shard(twin, "run", shard, ["part"]))
        entry = build_shard(twin, "run", shard, ["part"])
        assert entry is not None
        int8_store.storage.write_bytes(entry.path, twin.storage.read_bytes(entry.path))
        with pytest.raises(SpecMismatchError, match=r"codec\.sha256 is"):
            int8_store.commit({shard: entry}, "put")
        with pytest.raises(SpecMismatchError, match=r"codec\.sha256 is"):
            FeatureStore.open_or_create(int8_store.url, twin.info)

    def test_a_damaged_codec_is_named(self, int8_store: FeatureStore) -> None:
        assert int8_store.info.codec is not None
        path = int8_store.info.codec.path
        data = int8_store.storage.read_bytes(path)
        for place in range(0, len(data), 13):
            changed = bytearray(data)
            changed[place] ^= 1 << place % 8
            int8_store.storage.write_bytes(path, bytes(changed))
            with pytest.raises(CorruptFileError, match=rf"{path} is damaged"):
                codec_of(int8_store.info, int8_store.storage)
        int8_store.storage.delete(path)
        with pytest.raises(CorruptFileError, match=rf"{path} is missing"):
            FeatureStore.open(int8_store.url).snapshot().codec  # noqa: B018 - reading it raises

    def test_int8_and_a_codec_go_together(self, info: StoreInfo) -> None:
        spec = CodecSpec(path="codec/a.npy", sha256="0" * 64)
        for changes in ({"dtype": "int8"}, {"codec": spec}):
            with pytest.raises(ValueError, match="int8 needs a codec and nothing else has one"):
                StoreInfo(**{**info.model_dump(), **changes})
