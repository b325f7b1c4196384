"""Bugs that are planted in parsers, one at a time, to see that inputs find them: a guard or a bound is dropped.

Each is a text of one function and the text that takes its place (tests/planted.py); `kind`: the parser.
"""

from tests.planted import Bug

SPEC, FILE, READ = "featurestore.spec", "featurestore.format.datafile", "featurestore.parsing"
STATISTICS, INDEX, COLUMNS = "featurestore.format.codec", "trainer.samples.index", "trainer.samples.columns"
RUNS, CONFIG = "trainer.runs.checkpoint", "trainer.config"
CODEC, TENSORS = "serving.http.codec", "serving.http.inference"
SENT, DECODE = "serving.scoring.sent", "serving.scoring.decode"
MAPPING, LOGS, IMAGE = "pipeline.samples.mapping", "pipeline.samples.logs", "pipeline.images.decode"
DROPPED = [
    ("manifest", SPEC, "unseal", "not isinstance(fields, dict)"),
    ("manifest", SPEC, "unseal", "ValidationError"),
    ("manifest", SPEC, "unseal", "name not in fields"),
    ("manifest", READ, "parse_json", "RecursionError"),
    ("manifest", SPEC, "_check_relative", "len(path) > _MOST_PATH or not _PATH_BELOW.fullmatch(path)"),
    ("shard", FILE, "DataFile._translated", "pa.ArrowException, OSError, UnicodeDecodeError"),
    ("shard", FILE, "DataFile._translated", "UnicodeDecodeError, "),
    ("shard", FILE, "DataFile._translated", ", KeyError"),
    ("shard", FILE, "DataFile.__init__", "not schema.equals(schema_of(info))"),
    ("statistics", STATISTICS, "read_npy", ", SyntaxError, TypeError, tokenize.TokenError"),
    ("statistics", STATISTICS, "Moments.from_bytes", "ValueError"),
    ("statistics", STATISTICS, "Moments.from_bytes", " or moments_2D.ndim != 2 or len(moments_2D) != 2"),
    ("statistics", STATISTICS, "Moments.from_bytes", "moments_2D.dtype != np.float64 or "),
    ("samples", INDEX, "_opened", "pa.ArrowException, OSError, UnicodeDecodeError"),
    ("samples", INDEX, "read_row_groups", "pa.ArrowException, OSError"),
    ("samples", COLUMNS, "check_types", "not _fits(found.field(column).type, rule)"),
    ("samples", COLUMNS, "check_types", "missing.append(Problem.COLUMN_MISSING.of(column, wanted))"),
    ("samples", COLUMNS, "_encoded", "UnicodeDecodeError"),
    ("checkpoint", RUNS, "read_recorded", "CorruptFileError"),
    ("checkpoint", RUNS, "read_recorded", "FormatVersionError"),
    ("checkpoint", SPEC, "unseal", "ValidationError"),
    ("checkpoint", READ, "parse_json", "RecursionError"),
    ("json request", CODEC, "parse_json", "orjson.JSONDecodeError"),
    ("json request", CODEC, "request_of", "not isinstance(value, dict)"),
    ("json request", CODEC, "request_of", "not isinstance(columns, dict)"),
    ("json request", CODEC, "requests_of", "not isinstance(several, list)"),
    ("json request", SENT, "flatten", "not set(map(type, entries)) <= {list}"),
    ("json request", DECODE, "real_numbers", "not kinds <= usable"),
    ("json request", DECODE, "_int64", "OverflowError"),
    ("tensor request", TENSORS, "split_body", "not (header.isascii() and header.isdigit()) or len(header) > 12 or "),
    ("tensor request", TENSORS, "_tensor", "not isinstance(shape, list) or not _is_shape(shape)"),
    ("tensor request", TENSORS, "_tensor", 'datatype not in DTYPES and datatype != "BYTES"'),
    ("tensor request", TENSORS, "_flat", "kinds != {list}"),
    ("tensor request", TENSORS, "_from_binary", "len(data) % dtype.itemsize"),
    ("arrow request", CODEC, "arrow_table", "pa.ArrowException, OSError, ValueError"),
    ("arrow request", SENT, "sent_table", "SchemaError"),
    ("arrow request", DECODE, "_refuse_nulls", "is_null_N is not None and is_null_N.any()"),
    ("arrow request", DECODE, "_Decoder._check_lengths", "(wrong_M := found_M != wanted_M).any()"),
    ("mapping", READ, "parse_yaml", "yaml.YAMLError"),
    ("mapping", READ, "parse_yaml", "LookupError, AttributeError, "),
    ("mapping", MAPPING, "load_mapping", ", ValueError"),
    ("settings", CONFIG, "read_mapping", "not isinstance(values, Mapping)"),
    ("settings", CONFIG, "read_mapping", "ValueError, "),
    ("settings", CONFIG, "_lay_over", "isinstance(value, dict) and "),
    ("settings", READ, "parse_yaml", "yaml.YAMLError"),
    ("image", IMAGE, "decode", "Exception"),
    ("image", IMAGE, "decode", "orientation in TURNED_SIDEWAYS"),
    ("image", IMAGE, "_orientation", "orientation in range(1, 9)"),
    ("image", IMAGE, "_as_rgb", "image.mode in PIXELS_16_BIT"),
    ("csv log", MAPPING, "read_csv", "pa.ArrowException, UnicodeDecodeError"),
    ("csv log", MAPPING, "csv_names", "not rows"),
    ("csv log", MAPPING, "_each", "ValueError, "),
    ("csv log", MAPPING, "csv_beginning", ", CsvTextError"),
    ("csv log", LOGS, "_check_columns", "schema.names.count(name) > 1"),
    ("csv log", LOGS, "_check_columns", "name not in schema.names"),
]
"""The parser, the module, the function, and what of its text is dropped.

Not here: struct.error of an Arrow stream, as Arrow has looked at all offsets before we follow them; the most pixels of
an image, which Pillow limits too but for a JPEG, whose missing limit takes gigabytes to notice."""


def _instead(text: str) -> str:
    """Return what takes the place of a text: nothing for a part of a list, no error, or a condition that is false."""
    if text.startswith((", ", " or ")) or text.endswith((", ", " or ", " and ")):
        return ""
    return "ZeroDivisionError" if text.endswith(("Error", "Exception", "Error)")) else "False"


BUGS = [Bug(text, kind, f"{module}:{function}", text, _instead(text)) for kind, module, function, text in DROPPED]
NESTED = "self.flow_level >= _MOST_NESTED"
DEPTH = (f"{READ}:_Loader.compose_node", "self._depth > _MOST_NESTED", "False")
"""Lists inside each other are counted at both places: alone, either is enough."""
BUGS.append(Bug(NESTED, "mapping", f"{READ}:_Loader.fetch_flow_collection_start", NESTED, "False", (DEPTH,)))
