"""The columns of a request to a model, with their sides and rules: those of the fields that the model uses."""

from collections.abc import Collection, Mapping, Sequence

from serving.errors import RequestError
from serving.scoring.request import Request
from serving.scoring.values import as_list, short_repr
from trainer.config.options import near_match
from trainer.samples.columns import Rule, aligned_columns, rules_of, source_columns
from trainer.schema import Field, Schema

_WAYS_OUT = {"user": "put it into user", "ad": "put it into candidates, or into context if all have the same"}


class RequestColumns:
    """The columns of a request to a model with these fields of a schema."""

    def __init__(self, schema: Schema, fields: Sequence[Field]) -> None:
        self.schema = schema.model_copy(update={"fields": tuple(fields)})
        """The schema, restricted to the fields that the model uses."""
        every = rules_of(schema)  # an image's text is a uri, whichever field reads its column
        used = {column for field in fields for column in (field.column_name, field.weights) if column}
        self.rules: Mapping[str, Rule] = {column: rule for column, rule in every.items() if column in used}
        """Rules of the decoded columns; a crossed column counts as one."""
        self.sources: Mapping[str, Rule] = source_columns(self.rules)
        """Rules of the columns in a request."""
        self.aligned = aligned_columns(self.rules)
        self.nullable = {field.column_name for field in fields if field.kind == "content"}
        """Columns of images, whose nulls are missing images."""
        self._of_side = {side: self._names(side) for side in ("user", "ad")}
        roles = {schema.label, schema.group, schema.time}
        self._ignored = (roles | set(source_columns(every))) - set(self.sources)

    def num_candidates(self, request: Request, where: str = "") -> int:
        """Check the names of a request's columns, and count its candidates; `where` is a prefix for messages.

        Raises RequestError: a column is missing, unknown, in the wrong part or in two, or lists of candidates are not
        equally long.
        """
        user, context, candidates = request.user, request.context, request.candidates
        self._check_known(user, "user", "user", where)
        self._check_known(context, "context", "ad", where)
        self._check_known(candidates, "candidates", "ad", where)
        if context and (twice := context.keys() & candidates.keys() - self._ignored):
            raise RequestError(f"{where}column {min(twice)} is in context and in candidates; leave one out")
        count = self._count(request, where)
        absent = self._of_side["user"].difference(user)
        if count:
            absent |= self._of_side["ad"].difference(candidates, context)
        if absent:
            raise RequestError(where + (self._missing_inputs if request.as_tensors else self._missing)(absent))
        return count

    def check_table(self, names: Collection[str]) -> None:
        """Raise RequestError if a table has an unknown column; `check_types` finds missing ones."""
        for name in names:
            if name not in self.sources and name not in self._ignored:
                raise RequestError(f"column {short_repr(name)} is not a column of the model; {self._near(name)}")

    def _names(self, side: str) -> frozenset[str]:
        return frozenset(column for column, rule in self.sources.items() if rule.side == side)

    def _check_known(self, columns: Mapping[str, object], part: str, side: str, where: str) -> None:
        if columns.keys() <= self._of_side[side]:
            return
        for name in columns.keys() - self._of_side[side] - self._ignored:
            if isinstance(name, str) and name in self.sources:
                of_side = self.sources[name].side
                raise RequestError(f"{where}{part}.{name} is a column of side {of_side}; {_WAYS_OUT[of_side]}")
            raise RequestError(f"{where}{part}.{short_repr(name)} is not a column of the model; {self._near(name)}")

    def _near(self, name: object) -> str:
        return near_match(str(name), list(self.sources))

    def _missing(self, absent: Collection[str]) -> str:
        if len(absent) == 1:
            (name,) = absent
            rule = self.sources[name]
            return f"column {name} is missing, expected {expected(rule)}; {_WAYS_OUT[rule.side]}"
        of_side = {side: ", ".join(sorted(names & set(absent))) for side, names in self._of_side.items()}
        ways_out = [f"{names}: {_WAYS_OUT[side].replace(' it ', ' each ')}" for side, names in of_side.items() if names]
        return f"{len(absent)} columns are missing. {'. '.join(ways_out)}"

    def _missing_inputs(self, absent: Collection[str]) -> str:
        if len(absent) == 1:
            (name,) = absent
            return f"input {name} is missing, expected {expected(self.sources[name])}; send a tensor of this name"
        return f"{len(absent)} inputs are missing: {', '.join(sorted(absent))}; send a tensor for each"

    def _count(self, request: Request, where: str) -> int:
        candidates = request.candidates
        if set(map(type, candidates.values())) <= {list}:
            lengths = set(map(len, candidates.values()))
            if len(lengths) < 2:
                return lengths.pop() if lengths else 0
        counts = {column: self._length(column, values, where) for column, values in candidates.items()}
        first, count = next(iter(counts.items()))
        for other, other_count in counts.items():
            if other_count != count:
                one, two = (request.name_of("candidates", column) for column in (first, other))
                raise RequestError(
                    f"{where}{one} has {count} entries and {two} has {other_count}; each candidate needs one entry in "
                    "every column"
                )
        return count

    def _length(self, column: str, values: object, where: str) -> int:
        if (entries := as_list(values)) is None:
            raise RequestError(
                f"{where}candidates.{column} is {short_repr(values)}, and has to be a list with an entry for each"
                " candidate"
            )
        return len(entries)


def expected(rule: Rule) -> str:
    """Describe the values that a column must have in a user's or an ad's row."""
    inner = rule.depth - (rule.side == "ad")
    one, several = ("number", "numbers") if rule.is_real else ("whole number", "whole numbers")
    if rule.text:
        one, several = f"{one} or text", f"{several} or texts"
    each = f"a {one}" if inner == 0 else "a list of " + "lists of " * (inner - 1) + several
    return f"{each} for each candidate" if rule.side == "ad" else each
