"""Compiled loops over the bytes of raw Ali-CCP files and over their spills; no Python per row or per id.

A line is read in two steps: `parse` looks at all of it and changes nothing; only a line that is whole is entered into
the table of ids and the spill. So a line that is cut, malformed or read again leaves no trace.

All of it is one module, as numba looks at the file of a function alone to tell whether its machine code is still good.

The spill of a row or user is a run of int32 words. A feature is the code of its id; where its value is not 1, the
sign bit is set and the float32 value is the next word. What a code means (field, id) is in the table.
"""

# ruff: noqa: PLR0911, PLR0912, PLR0915 (compiled: what is done for each byte stands in one place)
# numba has types of its own:
# mypy: disable-error-code="assignment, arg-type, no-any-return"

from typing import Any, NamedTuple

import numpy as np

from pipeline.compute.compiled import compiled

MOST_NAME_BYTES = 64  # as in config.py; compiled functions use constants of their own file alone
COMMA, LF, CR, BLANK, TILDE, ZERO, POINT = 44, 10, 13, 32, 126, 48, 46
JOINS_FEATURES, BEFORE_ID, BEFORE_VALUE = 1, 2, 3  # \x01 \x02 \x03

# What a space of names holds: the indices of common features (of training and of test files), then the ids of a field.
INDEX_SPACES = 2
FIRST_FIELD_SPACE = INDEX_SPACES
AUTO, CATEGORICAL, MULTI, IGNORED = 0, 1, 2, 3

# columns of Fields.facts
KIND, IN_COMMON, IN_SKELETON, REPEATED, WEIGHTED, LAST_LINE = range(6)

# how a block ended
DONE, GROW, MALFORMED, TOO_MANY_FIELDS = range(4)

# counters
(
    LINES, STAMP, ROWS, ORPHANS, WITHOUT_COMMON, DUPLICATE_FIELDS, DUPLICATE_COMMON, FEAT_NUM_DIFFERS, EMPTY_IDS, IDS,
    USERS,
) = range(11)  # fmt: skip
COUNTERS = 11

# rules
DROP, NO_CONVERSION, CLICK = range(3)  # for a conversion without a click

ROW_HEADER = 3  # words: of the features that follow, labels (1 = click, 2 = conversion), number of the user or -1
CODE_MASK = np.int32(0x7FFFFFFF)
VALUE_FOLLOWS = np.int32(-0x80000000)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_FNV_START, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_U0, _U1, _U8, _U9, _U10, _U11, _U27, _U30, _U31, _U40, _U48 = (
    np.uint64(n) for n in (0, 1, 8, 9, 10, 11, 27, 30, 31, 40, 48)
)  # fmt: skip
_TEXT = np.uint64(1 << 63)  # in a slot: the key is the hash of a text, not a number
_CODES = np.uint64((1 << 40) - 1)
_LONG_NAME = np.uint64(1 << 63)
_MOST_DIGITS = 19  # 10^19 < 2^64
_ABSORB = np.uint64(10**18)  # a mantissa below takes another digit
_EXACT = np.uint64(1 << 53)
_LOW_BITS = np.uint64(0x7FF)
_LARGEST = 3.4028235677973362e38  # what float32 does not make infinite
_POWERS = np.array([10.0**n for n in range(23)])


class Table(NamedTuple):
    """Codes of ids by (space, id), in an open-addressing hash table."""

    slots: Any  # [power of two, 2] uint64: key; 0 = empty, else is a text << 63 | space << 40 | code + 1
    keys: Any  # [codes] uint64: the number itself, or where its text lies in `texts` (4 bytes of length before it)
    owners: Any  # [codes] int32: space << 1 | is a text
    values: Any  # [codes] int64: how often a training row has the id; the number of the user for an index
    texts: Any  # [bytes] uint8
    used: Any  # [2] int64: codes, bytes of texts


class Fields(NamedTuple):
    """The fields that were met."""

    names: Any  # [MOST_FIELDS, MOST_NAME_BYTES] uint8
    lengths: Any  # [MOST_FIELDS] int64
    packed: Any  # [MOST_FIELDS] uint64: see packed
    facts: Any  # [MOST_FIELDS, 6] int64
    following: Any  # [MOST_FIELDS] int64: the field that came after it last time
    used: Any  # [2] int64: fields, kind of a new one


class Parsed(NamedTuple):
    """The features of one line."""

    places: Any  # [features, 4] int64: start and end of name and id
    numbers: Any  # [features] uint64: the id, if it is a number
    plain: Any  # [features] bool: it is one
    values: Any  # [features] float64
    names: Any  # [features] uint64: see packed
    fields: Any  # [features] int64
    slots: Any  # [features] int64: where the search for the id begins


class Spill(NamedTuple):
    """Where the words of a block go."""

    words: Any  # [splits, room] int32
    floats: Any  # the same bytes as float32
    used: Any  # [splits] int64
    rows: Any  # [splits] int64 rows (or, for common features, users) written in this block
    lengths: Any  # [lines] int32 words of each user


class Rules(NamedTuple):
    """What is done with rows, in numbers."""

    orphans: int  # DROP, NO_CONVERSION or CLICK
    drop_without_common: bool
    by_index: bool  # split by the hash of the index, not of the sample id
    seed: Any  # uint64, mixed
    borders: Any  # [2] float64: train, train + validation
    fixed_split: int  # -1, or the split of every row
    index_space: int
    missing: Any  # [bytes] uint8: texts that mean no id, one after another
    missing_ends: Any  # [texts] int64


@compiled
def mixed(value: Any) -> Any:
    """SplitMix64, as encoding.splitmix64."""
    value += _GOLDEN
    value = (value ^ (value >> _U30)) * _MIX_1
    value = (value ^ (value >> _U27)) * _MIX_2
    return value ^ (value >> _U31)


@compiled
def text_hash(text: Any, start: int, end: int) -> Any:
    """FNV-1a of the bytes, mixed."""
    value = _FNV_START
    for at in range(start, end):
        value = (value ^ np.uint64(text[at])) * _FNV_PRIME
    return mixed(value)


@compiled
def text_hashes(text: Any, offsets: Any) -> Any:
    """The hash of each text of an Arrow string array's buffers."""
    hashes = np.empty(len(offsets) - 1, dtype=np.uint64)
    for number in range(len(hashes)):
        hashes[number] = text_hash(text, offsets[number], offsets[number + 1])
    return hashes


# ---------------------------------------------------------------- the table of ids


@compiled
def _find(table: Table, space: int, key: Any, span: Any) -> Any:
    """The code, or -1 - the slot where it would be. `span`: (text, start, end, whether the key is its hash)."""
    text, start, end, is_text = span
    tag = np.uint64(space) << _U40
    if is_text:
        tag |= _TEXT
    mask = np.uint64(len(table.slots) - 1)
    slot = mixed(key ^ (tag * _GOLDEN)) & mask
    while True:
        entry = table.slots[slot, 1]
        if entry == _U0:
            return -1 - np.int64(slot)
        if table.slots[slot, 0] == key and (entry & ~_CODES) == tag:
            code = np.int64(entry & _CODES) - 1
            if not is_text or _same(table, code, text, start, end):
                return code
        slot = (slot + _U1) & mask


@compiled
def _same(table: Table, code: int, text: Any, start: int, end: int) -> bool:
    first, length = text_place(table, code)
    if length != end - start:
        return False
    for at in range(length):  # noqa: SIM110 (compiled)
        if table.texts[first + at] != text[start + at]:
            return False
    return True


@compiled
def text_place(table: Table, code: int) -> Any:
    """(start, length) of a code's text."""
    at = np.int64(table.keys[code])
    length = 0
    for byte in range(4):
        length |= np.int64(table.texts[at + byte]) << (8 * byte)
    return at + 4, length


@compiled
def _intern(table: Table, space: int, key: Any, span: Any) -> Any:
    """The code of an id; a new one where it is new. The table must have room."""
    found = _find(table, space, key, span)
    if found >= 0:
        return found
    text, start, end, is_text = span
    code = table.used[0]
    table.used[0] += 1
    table.keys[code] = key
    tag = np.uint64(space) << _U40
    if is_text:
        tag |= _TEXT
        at = table.used[1]
        table.keys[code] = np.uint64(at)
        for byte in range(4):
            table.texts[at + byte] = ((end - start) >> (8 * byte)) & 255
        for byte in range(end - start):
            table.texts[at + 4 + byte] = text[start + byte]
        table.used[1] = at + 4 + end - start
    table.owners[code] = space << 1 | is_text
    table.values[code] = -1 if space < FIRST_FIELD_SPACE else 0
    table.slots[-1 - found, 0] = key
    table.slots[-1 - found, 1] = tag | np.uint64(code + 1)
    return code


@compiled
def rehash(table: Table) -> None:
    """Enter all codes into empty slots."""
    mask = np.uint64(len(table.slots) - 1)
    for code in range(table.used[0]):
        owner = table.owners[code]
        tag, key = np.uint64(owner >> 1) << _U40, table.keys[code]
        if owner & 1:
            tag |= _TEXT
            first, length = text_place(table, code)
            key = text_hash(table.texts, first, first + length)
        slot = mixed(key ^ (tag * _GOLDEN)) & mask
        while table.slots[slot, 1] != _U0:
            slot = (slot + _U1) & mask
        table.slots[slot, 0] = key
        table.slots[slot, 1] = tag | np.uint64(code + 1)


@compiled
def _room(table: Table, entries: int, letters: int) -> bool:
    codes = table.used[0] + entries
    return (
        codes <= len(table.keys)
        and codes * 5 <= len(table.slots) * 3
        and table.used[1] + letters + 4 * entries <= len(table.texts)
    )


@compiled
def _index_code(table: Table, space: int, span: Any, enter: bool) -> Any:
    """The code of an index of common features, or -1. 16 digits of lower-case hex are a number; else it is a text."""
    text, start, end = span
    key, is_text = _U0, end - start != 16
    for at in range(start, end):
        letter = np.int64(text[at])
        if 48 <= letter <= 57:
            digit = letter - 48
        elif 97 <= letter <= 102:
            digit = letter - 87
        else:
            digit, is_text = 0, True
        key = key * np.uint64(16) + np.uint64(digit)
    if is_text:
        key = text_hash(text, start, end)
    if enter:
        return _intern(table, space, key, (text, start, end, is_text))
    return max(-1, _find(table, space, key, (text, start, end, is_text)))


# ---------------------------------------------------------------- one line


@compiled
def _two_product(a: float, b: float) -> float:
    """What a * b loses by rounding (Dekker 1971)."""
    product = a * b
    upper = a * 134217729.0
    a_high = upper - (upper - a)
    a_low = a - a_high
    upper = b * 134217729.0
    b_high = upper - (upper - b)
    b_low = b - b_high
    return a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


@compiled
def _scaled(mantissa: Any, exponent: int) -> float:
    """mantissa * 10^exponent as the nearest double; beyond 10^22, to its last bits."""
    if mantissa == _U0 or exponent < -400:
        return 0.0
    if exponent > 400:
        return np.inf
    step = min(22, max(-22, exponent))
    if mantissa < _EXACT:
        value = float(mantissa) * _POWERS[step] if step >= 0 else float(mantissa) / _POWERS[-step]
    else:  # in two doubles
        high, low = float(mantissa & ~_LOW_BITS), float(mantissa & _LOW_BITS)
        power = _POWERS[abs(step)]
        if step >= 0:
            value = high * power + (_two_product(high, power) + low * power)
        else:
            value = high / power
            rest = (high - value * power) - _two_product(value, power)
            value += (rest + low) / power
    exponent -= step
    while exponent != 0:
        step = min(22, max(-22, exponent))
        value = value * _POWERS[step] if step > 0 else value / _POWERS[-step]
        exponent -= step
    return value


@compiled
def _number(text: Any, at: int) -> Any:
    """(is a finite float32, value, position after it) of a decimal number."""
    negative = text[at] == 45
    if negative or text[at] == 43:
        at += 1
    mantissa, exponent, digits, fraction = _U0, 0, 0, False
    while True:
        digit = np.uint64(text[at]) - _U48
        if digit <= _U9:
            digits += 1
            if mantissa < _ABSORB:
                mantissa = mantissa * _U10 + digit
                exponent -= fraction
            else:
                exponent += not fraction
        elif text[at] == POINT and not fraction:
            fraction = True
        else:
            break
        at += 1
    if digits == 0:
        return False, 0.0, at
    if text[at] in (69, 101):  # E
        at += 1
        sign = -1 if text[at] == 45 else 1
        if text[at] in (43, 45):
            at += 1
        power, digits = 0, 0
        while 48 <= text[at] <= 57:
            power = min(10_000, power * 10 + np.int64(text[at]) - 48)
            digits += 1
            at += 1
        if digits == 0:
            return False, 0.0, at
        exponent += sign * power
    value = _scaled(mantissa, exponent)
    return value < _LARGEST, -value if negative else value, at


@compiled
def packed(text: Any, start: int, end: int) -> Any:
    """A name of up to 7 bytes and its length in one number; of a longer one, its hash, which another name may have."""
    if end - start > 7:
        return text_hash(text, start, end) | _LONG_NAME
    packed = np.uint64(end - start)
    for at in range(start, end):
        packed = packed << _U8 | np.uint64(text[at])
    return packed


@compiled
def _parse(text: Any, at: int, parsed: Parsed) -> Any:
    """(number of features, or -1 where they are malformed; where the next line starts) of a feat_list."""
    count = 0
    if text[at] == LF:
        return 0, at + 1
    if text[at] == CR and text[at + 1] == LF:
        return 0, at + 2
    while True:
        start = at
        while BLANK <= text[at] <= TILDE and text[at] != COMMA:
            at += 1
        if text[at] != BEFORE_ID or not 0 < at - start <= MOST_NAME_BYTES:
            return -1, at
        parsed.places[count, 0], parsed.places[count, 1] = start, at
        parsed.names[count] = packed(text, start, at)
        at += 1
        start, number, plain = at, _U0, True
        while True:
            digit = np.uint64(text[at]) - _U48
            if digit > _U9:
                if text[at] == BEFORE_VALUE:
                    break
                if not BLANK <= text[at] <= TILDE or text[at] == COMMA:
                    return -1, at
                plain = False
            number = number * _U10 + digit
            at += 1
        parsed.places[count, 2], parsed.places[count, 3] = start, at
        parsed.numbers[count] = number
        parsed.plain[count] = plain and 0 < at - start <= _MOST_DIGITS and (text[start] != ZERO or at - start == 1)
        fits, value, at = _number(text, at + 1)
        if not fits:
            return -1, at
        parsed.values[count] = value
        count += 1
        if text[at] == JOINS_FEATURES:
            at += 1
        elif text[at] == LF:
            return count, at + 1
        elif text[at] == CR and text[at + 1] == LF:
            return count, at + 2
        else:
            return -1, at


@compiled
def _cell(text: Any, at: int) -> int:
    """Where the comma after a cell is, or -1."""
    while BLANK <= text[at] <= TILDE and text[at] != COMMA:
        at += 1
    return at if text[at] == COMMA else -1


@compiled
def _count_cell(text: Any, at: int) -> Any:
    """(value or -1, position after the comma) of a cell that holds a count."""
    start, value = at, 0
    while 48 <= text[at] <= 57 and at - start < 10:
        value = value * 10 + np.int64(text[at]) - 48
        at += 1
    return (value if at > start and text[at] == COMMA else -1), at + 1


@compiled
def _fields(text: Any, parsed: Parsed, count: int, fields: Fields) -> bool:
    """The number of the field of each feature, a new one where it is new; False where there are too many."""
    field = -1
    for number in range(count):
        name = parsed.names[number]
        if field >= 0 and fields.packed[field] == name and name < _LONG_NAME:  # the same again
            parsed.fields[number] = field
            continue
        # most likely what came next in the line before
        previous, field = field, 0 if field < 0 else fields.following[field]
        if fields.packed[field] != name or name >= _LONG_NAME:
            field = _searched(text, parsed, number, fields)
            if field < 0:
                return False
            if previous >= 0:
                fields.following[previous] = field
        parsed.fields[number] = field
    return True


@compiled
def _searched(text: Any, parsed: Parsed, number: int, fields: Fields) -> Any:
    start, end, name = parsed.places[number, 0], parsed.places[number, 1], parsed.names[number]
    for field in range(fields.used[0]):
        if fields.packed[field] == name and fields.lengths[field] == end - start:
            same = True
            for at in range(end - start):
                same = same and fields.names[field, at] == text[start + at]
            if same:
                return field
    field = fields.used[0]
    if field == len(fields.lengths):
        return -1
    fields.used[0] += 1
    for at in range(end - start):
        fields.names[field, at] = text[start + at]
    fields.lengths[field] = end - start
    fields.packed[field] = name
    fields.facts[field, KIND] = fields.used[1]
    return field


@compiled
def _means_nothing(rules: Rules, text: Any, start: int, end: int) -> bool:
    """The id is a text that means "no value"."""
    if start == end:
        return True
    first = 0
    for last in rules.missing_ends:
        if last - first == end - start:
            same = True
            for at in range(end - start):
                same = same and rules.missing[first + at] == text[start + at]
            if same:
                return True
        first = last
    return False


@compiled
def _enter(line: Any, table: Table, fields: Fields, spill: Spill, rules: Rules) -> Any:
    """A line's features to the spill: words written, or -1 for too many fields. `line`: (text, parsed, features,
    split, column of facts, how often its ids count, counters)."""
    text, parsed, count, split, side, counted, counters = line
    if not _fields(text, parsed, count, fields):
        return -1
    slots, facts, values = table.slots, fields.facts, table.values
    mask = np.uint64(len(slots) - 1)
    # memory answers late: ask for all slots before any is needed
    asked = _U0
    for number in range(count):
        tag = np.uint64(FIRST_FIELD_SPACE + parsed.fields[number]) << _U40
        slot = mixed(parsed.numbers[number] ^ (tag * _GOLDEN)) & mask
        parsed.slots[number] = np.int64(slot)
        asked |= slots[slot, 1]
    counters[STAMP] += 1 + (asked == ~_U0)  # which no slot holds
    stamp, at = counters[STAMP], spill.used[split]
    for number in range(count):
        field = parsed.fields[number]
        if facts[field, KIND] == IGNORED:
            continue
        code: Any = np.int64(-1)
        space = FIRST_FIELD_SPACE + field
        if parsed.plain[number]:
            key, slot = parsed.numbers[number], parsed.slots[number]
            tag = np.uint64(space) << _U40
            entry = slots[slot, 1]
            while entry != _U0:
                if slots[slot, 0] == key and (entry & ~_CODES) == tag:
                    code = np.int64(entry & _CODES) - 1
                    break
                slot = np.int64(np.uint64(slot + 1) & mask)
                entry = slots[slot, 1]
        elif _means_nothing(rules, text, parsed.places[number, 2], parsed.places[number, 3]):
            counters[EMPTY_IDS] += 1
            continue
        if facts[field, LAST_LINE] == stamp:
            if facts[field, KIND] == CATEGORICAL:
                counters[DUPLICATE_FIELDS] += 1
                continue
            facts[field, REPEATED] += 1
        facts[field, LAST_LINE] = stamp
        facts[field, side] += 1
        if code < 0:
            start, end = parsed.places[number, 2], parsed.places[number, 3]
            is_text = not parsed.plain[number]
            key = text_hash(text, start, end) if is_text else parsed.numbers[number]
            code = _intern(table, space, key, (text, start, end, is_text))
        if counted:
            values[code] += counted
        value = parsed.values[number]
        if value == 1.0:
            spill.words[split, at] = np.int32(code)
            at += 1
        else:
            facts[field, WEIGHTED] += 1
            spill.words[split, at] = np.int32(code) | VALUE_FOLLOWS
            spill.floats[split, at + 1] = np.float32(value)
            at += 2
        counters[IDS] += 1
    written = at - spill.used[split]
    spill.used[split] = at
    return written


# ---------------------------------------------------------------- blocks of whole lines


@compiled
def scan_common(block: Any, parsed: Parsed, state: Any, spill: Spill, rules: Rules) -> Any:
    """(how it ended, where) of lines `index,feat_num,feat_list`. `block`: (text, start, end); `state`: (table, fields,
    counters)."""
    text, at, stop = block
    table, fields, counters = state
    while at < stop:
        line = at
        if text[at] == LF or (text[at] == CR and text[at + 1] == LF):
            at += 1 if text[at] == LF else 2
            counters[LINES] += 1
            continue
        comma = _cell(text, at)
        if comma <= at:
            return MALFORMED, line
        claimed, features = _count_cell(text, comma + 1)
        if claimed < 0:
            return MALFORMED, line
        count, after = _parse(text, features, parsed)
        if count < 0:
            return MALFORMED, line
        if not _room(table, count + 1, after - line):
            return GROW, line
        counters[LINES] += 1
        counters[FEAT_NUM_DIFFERS] += claimed != count
        code = _index_code(table, rules.index_space, (text, at, comma), True)
        at = after
        if table.values[code] >= 0:
            counters[DUPLICATE_COMMON] += 1
            continue
        written = _enter((text, parsed, count, 0, IN_COMMON, 0, counters), table, fields, spill, rules)
        if written < 0:
            return TOO_MANY_FIELDS, line
        table.values[code] = counters[USERS]
        counters[USERS] += 1
        spill.lengths[spill.rows[0]] = written
        spill.rows[0] += 1
    return DONE, at


@compiled
def scan_skeleton(block: Any, parsed: Parsed, state: Any, spill: Spill, rules: Rules) -> Any:
    """As `scan_common`, of lines `sample_id,click,buy,common_feature_index,feat_num,feat_list`; `state` ends with
    [users] int32, the training rows of each."""
    text, at, stop = block
    table, fields, counters, user_rows = state
    while at < stop:
        line = at
        if text[at] == LF or (text[at] == CR and text[at + 1] == LF):
            at += 1 if text[at] == LF else 2
            counters[LINES] += 1
            continue
        sample = _cell(text, at)
        if sample <= at:
            return MALFORMED, line
        click: Any = -1
        buy: Any = -1
        if text[sample + 1] - ZERO in (0, 1) and text[sample + 2] == COMMA:
            click = np.int64(text[sample + 1]) - ZERO
            if text[sample + 3] - ZERO in (0, 1) and text[sample + 4] == COMMA:
                buy = np.int64(text[sample + 3]) - ZERO
        if buy < 0:
            return MALFORMED, line
        start = sample + 5
        comma = _cell(text, start)
        if comma < 0:
            return MALFORMED, line
        claimed, features = _count_cell(text, comma + 1)
        if claimed < 0:
            return MALFORMED, line
        count, after = _parse(text, features, parsed)
        if count < 0:
            return MALFORMED, line
        if not _room(table, count, after - line):
            return GROW, line
        counters[LINES] += 1
        counters[FEAT_NUM_DIFFERS] += claimed != count
        at = after
        orphan = buy == 1 and click == 0
        code = _index_code(table, rules.index_space, (text, start, comma), False)
        user = table.values[code] if code >= 0 else -1
        counters[ORPHANS] += orphan
        counters[WITHOUT_COMMON] += user < 0
        if (orphan and rules.orphans == DROP) or (user < 0 and rules.drop_without_common):
            continue
        if orphan and rules.orphans == CLICK:
            click = 1
        elif orphan:
            buy = 0
        split: Any = rules.fixed_split
        if split < 0:
            key = text_hash(text, start, comma) if rules.by_index else text_hash(text, line, sample)
            uniform = (mixed(key ^ rules.seed) >> _U11) * 2.0**-53
            split = np.int64(uniform >= rules.borders[0]) + np.int64(uniform >= rules.borders[1])
        header = spill.used[split]
        spill.used[split] += ROW_HEADER
        training = np.int64(split == 0)
        written = _enter((text, parsed, count, split, IN_SKELETON, training, counters), table, fields, spill, rules)
        if written < 0:
            return TOO_MANY_FIELDS, line
        spill.words[split, header] = written
        spill.words[split, header + 1] = click | buy << 1
        spill.words[split, header + 2] = user
        if user >= 0:
            user_rows[user] += training
        spill.rows[split] += 1
        counters[ROWS] += 1
    return DONE, at


# ---------------------------------------------------------------- from codes to columns


@compiled
def grouped(owners: Any, spaces: int) -> Any:
    """(codes ordered by their space, [spaces + 1] where each begins)."""
    bounds = np.zeros(spaces + 1, dtype=np.int64)
    for owner in owners:
        bounds[(owner >> 1) + 1] += 1
    for space in range(spaces):
        bounds[space + 1] += bounds[space]
    order, at = np.empty(len(owners), dtype=np.int64), bounds.copy()
    for code in range(len(owners)):
        space = owners[code] >> 1
        order[at[space]] = code
        at[space] += 1
    return order, bounds


@compiled
def spelt(table: Table, codes: Any) -> Any:
    """The texts of codes as the buffers of an Arrow string array: bytes, offsets."""
    offsets = np.zeros(len(codes) + 1, dtype=np.int32)
    for number in range(len(codes)):
        code = codes[number]
        if table.owners[code] & 1:
            length = text_place(table, code)[1]
        else:
            length, rest = 1, table.keys[code] // _U10
            while rest:
                length += 1
                rest //= _U10
        offsets[number + 1] = offsets[number] + length
    text = np.empty(offsets[-1], dtype=np.uint8)
    for number in range(len(codes)):
        code, start, end = codes[number], offsets[number], offsets[number + 1]
        if table.owners[code] & 1:
            first = text_place(table, code)[0]
            for at in range(end - start):
                text[start + at] = table.texts[first + at]
        else:
            rest = table.keys[code]
            for at in range(end - start):
                text[end - 1 - at] = np.uint8(rest % _U10) + np.uint8(48)
                rest //= _U10
    return text, offsets


@compiled
def count_common(words: Any, lengths: Any, rows: Any, values: Any) -> None:
    """Add the ids of users, as often as each has training rows."""
    at = 0
    for user in range(len(lengths)):
        end = at + lengths[user]
        while at < end:
            word = words[at]
            values[word & CODE_MASK] += rows[user]
            at += 2 if word < 0 else 1


@compiled
def encode_users(words: Any, lengths: Any, target: Any, layout: Any, out: Any) -> None:
    """Users' words as ids, column by column: the ids of single-valued columns, the number of ids of each multi-valued
    one, then its ids and (where weighted) its values.

    `target`: [codes, 2] column and id; `layout`: ([columns] place among the single or multi-valued ones of users,
    [columns] is multi-valued, [columns] is weighted, numbers of both); `out`: (words, the same as floats, lengths).
    """
    place, multi, weighted, singles, multis = layout
    records, floats, record_lengths = out
    values = words.view(np.float32)
    starts = np.empty(multis, dtype=np.int64)
    has_values = np.zeros(multis, dtype=np.bool_)
    for column in range(len(place)):
        if multi[column] and place[column] >= 0:
            has_values[place[column]] = weighted[column]
    first = at = 0
    for user in range(len(lengths)):
        end = first + lengths[user]
        for number in range(singles):
            records[at + number] = 1  # missing
        counts = at + singles
        for number in range(multis):
            records[counts + number] = 0
        for fill in range(2):  # the number of ids, then the ids
            source = first
            while source < end:
                word = words[source]
                column, number = target[word & CODE_MASK, 0], target[word & CODE_MASK, 1]
                if not multi[column]:
                    records[at + place[column]] = number
                elif fill == 0:
                    records[counts + place[column]] += 1
                else:
                    position = place[column]
                    records[starts[position]] = number
                    if weighted[column]:
                        value = values[source + 1] if word < 0 else np.float32(1)
                        floats[starts[position] + records[counts + position]] = value
                    starts[position] += 1
                source += 2 if word < 0 else 1
            if fill == 0:
                source = counts + multis
                for number in range(multis):
                    starts[number] = source
                    source += records[counts + number] * (1 + has_values[number])
                after = source
        record_lengths[user] = after - at
        first, at = end, after


@compiled
def walk_rows(words: Any, rows: Any, found: int) -> Any:
    """(rows, words) that lie whole in `words`, from row `found` on. `rows`: (starts, click, conversion, users), which
    are filled."""
    starts, click, conversion, users = rows
    at = 0
    if found > 0:
        last = starts[found - 1]
        at = last + ROW_HEADER + words[last]
    while found < len(starts) and at + ROW_HEADER <= len(words) and at + ROW_HEADER + words[at] <= len(words):
        starts[found] = at
        click[found] = words[at + 1] & 1
        conversion[found] = words[at + 1] >> 1
        users[found] = words[at + 2]
        found += 1
        at += ROW_HEADER + words[at]
    return found, at


@compiled
def gather(window: Any, first: int, starts: Any, copies: Any) -> None:
    """Records of users from a window of their file, which begins at word `first`. `starts`: (start and end of each
    record, where its copy begins)."""
    begins, ends, to = starts
    for number in range(len(begins)):
        at = to[number]
        for word in range(begins[number] - first, ends[number] - first):
            copies[at] = window[word]
            at += 1


@compiled
def fill_columns(source: Any, row: int, target: Any, layout: Any, columns: Any) -> Any:
    """(row reached, multi-valued column that is full or -1): rows `row` on into the columns of a row group.

    `source`: (words of the rows, start of each, records of users, start of each row's or -1); `layout`: (columns of
    users' single values, their multi-valued ones, [columns] is weighted); `columns`: (single [singles, rows], offsets
    [multis, rows + 1], ids, values, [multis + 1] where each column begins in both).
    """
    words, starts, records, places = source
    user_singles, user_multis, weighted = layout
    single, offsets, ids, values, bases = columns
    floats, record_floats = words.view(np.float32), records.view(np.float32)
    singles, multis = len(single), len(offsets)
    while row < len(starts):
        for multi in range(multis):
            offsets[multi, row + 1] = offsets[multi, row]
        for column in range(singles):
            single[column, row] = 1  # missing
        at = places[row]
        if at >= 0:
            for number in range(len(user_singles)):
                single[user_singles[number], row] = records[at + number]
            counts = at + len(user_singles)
            at = counts + len(user_multis)
            for number in range(len(user_multis)):
                multi, count = user_multis[number], records[counts + number]
                to = bases[multi] + offsets[multi, row + 1]
                if to + count > bases[multi + 1]:
                    return row, multi
                for element in range(count):
                    ids[to + element] = records[at + element]
                at += count
                if weighted[singles + multi]:
                    for element in range(count):
                        values[to + element] = record_floats[at + element]
                    at += count
                offsets[multi, row + 1] += count
        at = starts[row] + ROW_HEADER
        end = at + words[starts[row]]
        while at < end:
            word = words[at]
            column, number = target[word & CODE_MASK, 0], target[word & CODE_MASK, 1]
            if column < singles:
                single[column, row] = number
            else:
                multi = column - singles
                to = bases[multi] + offsets[multi, row + 1]
                if to == bases[multi + 1]:
                    return row, multi
                ids[to] = number
                if weighted[column]:
                    values[to] = floats[at + 1] if word < 0 else np.float32(1)
                offsets[multi, row + 1] += 1
            at += 2 if word < 0 else 1
        row += 1
    return row, -1
