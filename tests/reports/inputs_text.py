"""Inputs whose fault lies in the text: rows and quotes, encodings, cells that pandas writes."""

from collections.abc import Callable
from pathlib import Path

from tests.reports.making import (
    AREA,
    ONE,
    POLYGON,
    SIZE,
    Input,
    P,
    T,
    compressed,
    csv_one,
    jsonl,
    mask,
    one_line,
    parquet,
    rows,
    runs,
    table,
)

QUOTING = [
    Input("rows and quotes", "CSV, plain", table("t.csv", csv_one("the block")), ONE),
    Input(
        "rows and quotes",
        "CSV, doubled quotes",
        table("t.csv", csv_one('"the ""block"""')),
        [('the "block"', AREA, "train")],
    ),
    Input(
        "rows and quotes",
        "CSV, quote in the middle",
        table("t.csv", csv_one('the 21" block')),
        [('the 21" block', AREA, "train")],
    ),
    Input("rows and quotes", "CSV, stray quotes at the start", table("t.csv", csv_one('"stop" sign')), "line 2"),
    Input(
        "rows and quotes",
        "CSV, a quote never closed",
        table("t.csv", f'image,sentence,mask,split\na.jpg,"the block,m.png,train\nb.jpg,the thing,{P},train\n'),
        "line ",
    ),
    Input(
        "rows and quotes",
        "CSV, comma in quotes",
        table("t.csv", csv_one('"the block, red"')),
        [("the block, red", AREA, "train")],
    ),
    Input(
        "rows and quotes",
        "CSV, comma without quotes",
        table("t.csv", csv_one("the block, red")),
        "Expected 4 columns, got 5",
    ),
    Input("rows and quotes", "CSV, line break in quotes", table("t.csv", csv_one('"the\nblock"')), ONE),
    Input("rows and quotes", "CSV, CR LF", table("t.csv", csv_one("the block").replace("\n", "\r\n")), ONE),
    Input("rows and quotes", "CSV, no line feed at the end", table("t.csv", csv_one("the block").strip()), ONE),
    Input(
        "rows and quotes",
        "CSV, semicolons",
        table("t.csv", f"image;sentence;mask;split\na.jpg;the block;{P};train\n"),
        ONE,
    ),
    Input(
        "rows and quotes", "CSV, bars", table("t.csv", f"image|sentence|mask|split\na.jpg|the block|{T}|train\n"), ONE
    ),
    Input(
        "rows and quotes",
        "CSV, tabs",
        table("t.csv", f"image\tsentence\tmask\tsplit\na.jpg\tthe block\t{T}\ttrain\n"),
        ONE,
    ),
    Input(
        "rows and quotes",
        "CSV, spaces after commas",
        table("t.csv", f"image, sentence, mask, split\na.jpg, the block, {P}, train\n"),
        ONE,
    ),
    Input("rows and quotes", "CSV, empty rows", table("t.csv", csv_one("the block") + ",,,\n\n"), ONE),
    Input(
        "rows and quotes",
        "CSV, a column twice",
        table("t.csv", f"image,mask,mask\na.jpg,{P},{P}\n"),
        "has the column 'mask' twice",
    ),
    Input(
        "rows and quotes",
        "TSV, quotes kept",
        table("t.tsv", f'image\tsentence\tmask\tsplit\na.jpg\t"stop" block\t{T}\ttrain\n'),
        [('"stop" block', AREA, "train")],
    ),
    Input(
        "rows and quotes",
        "TSV, one quote",
        table(
            "t.tsv", f'image\tsentence\tmask\tsplit\na.jpg\t"the block\t{T}\ttrain\nb.jpg\tthe 2" block\t{T}\ttrain\n'
        ),
        [('"the block', AREA, "train"), ('the 2" block', AREA, "train")],
    ),
    Input(
        "rows and quotes",
        "TSV of pandas",
        table("t.tsv", f'image\tsentence\tmask\tsplit\na.jpg\t"""stop"" block"\t{T}\ttrain\n'),
        [('"stop" block', AREA, "train")],
    ),
    Input(
        "rows and quotes",
        "TSV, all in quotes",
        table("t.tsv", f'"image"\t"sentence"\t"mask"\t"split"\n"a.jpg"\t"the block"\t"{T}"\t"train"\n'),
        ONE,
    ),
    Input(
        "rows and quotes",
        "TSV, a torn row",
        table("t.tsv", f"image\tsentence\tmask\tsplit\na.jpg\tthe\nblock\t{T}\ttrain\n"),
        "line 2",
    ),
    Input(
        "rows and quotes",
        "JSONL, U+2028",
        table("t.jsonl", one_line("the\u2028block")),
        ONE,
    ),
    Input(
        "rows and quotes",
        "JSONL, U+0085",
        table("t.jsonl", one_line("the\u0085block")),
        ONE,
    ),
    Input("rows and quotes", "JSONL, CR LF and blank lines", table("t.jsonl", rows({}) + "\r\n\r\n"), ONE),
    Input("rows and quotes", "JSONL, a list", table("t.jsonl", "[1]"), "line 1 holds a list"),
    Input(
        "rows and quotes",
        "JSON, a key twice",
        table("t.json", '[{"image": "a.jpg", "sentence": "x", "sentence": "y", "box": [1,2,3,4]}]'),
        "the key 'sentence' is given twice",
    ),
]
CAFE = [("the café", AREA, "train")]
ENCODINGS = [
    *(
        Input("encodings", f"{ending}, {encoding}", table(f"t.{ending}", text.encode(encoding)), CAFE)
        for ending, text in (
            ("csv", csv_one("the café")),
            ("jsonl", one_line("the café")),
        )
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32")
    ),
    *(
        Input("encodings", f"{ending}, {encoding}, not named", table(f"t.{ending}", text.encode(encoding)), "UTF-8")
        for ending, text in (
            ("csv", csv_one("the café")),
            ("jsonl", one_line("the café")),
        )
        for encoding in ("cp1252", "latin-1", "mac-roman")
    ),
    Input(
        "encodings", "csv, utf-16-le without a mark", table("t.csv", csv_one("the block").encode("utf-16-le")), "UTF-16"
    ),
    Input("encodings", "U+FFFD in a sentence", jsonl({"sentence": "the caf\ufffd"}), "U+FFFD"),
    Input("encodings", "NUL in a sentence", jsonl({"sentence": "the\0block"}), "NUL"),
    Input("encodings", "half of a surrogate pair", jsonl({"sentence": "the \ud83d block"}), "surrogate"),
    Input("encodings", "an emoji", jsonl({"sentence": "the 😀 block"}), [("the 😀 block", AREA, "train")]),
    Input("encodings", "no-break spaces", jsonl({"sentence": "the\u00a0block"}), ONE),
]


def cell(sentences: str = "the block", made: str = P, column: str = "sentence") -> Callable[[Path], list[str]]:
    return table("t.csv", f"image,{column},mask,split\na.jpg,{sentences},{made},train\n")


TWO = [("one", AREA, "train"), ("two", AREA, "train")]
RLE = {"size": list(SIZE), "counts": runs(mask())}
CELLS = [
    Input("cells of pandas", "list of texts, JSON", cell('"[""one"", ""two""]"', column="sentences"), TWO),
    Input("cells of pandas", "list of texts, repr", cell("\"['one', 'two']\"", column="sentences"), TWO),
    Input(
        "cells of pandas",
        "list of texts, an apostrophe",
        cell('"[\'one\', ""the dog\'s""]"', column="sentences"),
        [("one", AREA, "train"), ("the dog's", AREA, "train")],
    ),
    Input("cells of pandas", "numpy array of texts", cell("\"['one' 'two']\"", column="sentences"), "not JSON"),
    Input("cells of pandas", "a sentence in brackets", cell("[the block]"), [("[the block]", AREA, "train")]),
    Input(
        "cells of pandas",
        "a sentence that starts with a bracket",
        cell("[1] the block"),
        [("[1] the block", AREA, "train")],
    ),
    Input(
        "cells of pandas", "a cut list", cell("\"['one', 'tw\"", column="sentences"), [("['one', 'tw", AREA, "train")]
    ),
    Input("cells of pandas", "run lengths, repr", cell(made=f'"{RLE}"'), ONE),
    Input(
        "cells of pandas",
        "run lengths with bytes, repr",
        cell(
            made='"'
            + str({"size": list(SIZE), "counts": compressed(mask())["counts"].encode()}).replace('"', '""')
            + '"'
        ),
        ONE,
    ),
    Input("cells of pandas", "polygons as tuples, repr", cell(made=f'"[{tuple(POLYGON)}]"'), ONE),
    Input("cells of pandas", "numpy array of numbers", cell(made='"[[ 8  8 24  8 24 24  8 24]]"'), "not JSON"),
    Input("cells of pandas", "array(...) repr", cell(made='"[array([8, 8, 24])]"'), "not JSON"),
    Input("cells of pandas", "a long array cut by ...", cell(made='"[[8 8 ... 8 24]]"'), "not JSON"),
    Input(
        "cells of pandas",
        "ref_id 3.0",
        table("t.csv", f"image,sentence,mask,split,ref_id\na.jpg,the block,{P},train,3.0\nb.jpg,x,{P},train,\n"),
        [("the block", AREA, "train"), ("x", AREA, "train")],
    ),
    *(
        Input(
            "cells of pandas",
            f"no_target {value!r}",
            table("t.csv", f"image,sentence,mask,split,no_target\na.jpg,the block,{P},train,{value}\n"),
            ONE,
        )
        for value in ("0.0", "False", "0", "no", "nan", "", "FALSE")
    ),
    *(
        Input(
            "cells of pandas",
            f"empty mask {value!r}",
            table("t.csv", f"image,sentence,mask,split,no_target\na.jpg,the block,{value},train,1.0\n"),
            [("the block", 0, "train")],
        )
        for value in ("nan", "NaN", "", "None", "null", "[]")
    ),
    Input(
        "cells of pandas",
        "Parquet, float ids and flags",
        parquet(
            {
                "image": ["a.jpg", "b.jpg"],
                "sentence": ["the block", "x"],
                "mask": [[[float(c) for c in POLYGON]], None],
                "ref_id": [3.0, float("nan")],
                "no_target": [0.0, 1.0],
                "split": ["train"] * 2,
            }
        ),
        [("the block", AREA, "train"), ("x", 0, "train")],
    ),
    Input(
        "cells of pandas",
        "ref_id 3.5",
        table("t.csv", f"image,sentence,mask,split,ref_id\na.jpg,the block,{P},train,3.5\n"),
        "ref_id is '3.5', not a whole number",
    ),
    Input(
        "cells of pandas",
        "ref_id as a text",
        table("t.csv", f"image,sentence,mask,split,ref_id\na.jpg,the block,{P},train,obj-7\n"),
        ONE,
    ),
    Input("cells of pandas", "a sentence that is `none`", cell("none"), [("none", AREA, "train")]),
    Input(
        "cells of pandas", "columns in capitals", table("t.csv", csv_one("the block", "Image,Sentence,MASK,Split")), ONE
    ),
    Input(
        "cells of pandas",
        "an index column",
        table("t.csv", f",image,sentence,mask,split\n0,a.jpg,the block,{P},train\n"),
        ONE,
    ),
]
