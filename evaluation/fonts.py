"""The Chinese characters of a report: a small font made of exactly those it shows.

A font of the system is used first, the one in requirements.txt else. Figures hold the glyphs as paths and the
HTML holds the small font, so that neither needs a font where it is read.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont, TTLibError
from matplotlib import font_manager

FAMILY = "Report CJK"
FIRST_CJK = 0x2E80  # the radicals; all East Asian blocks lie above, and no alphabet of Europe does
# Those that come with Windows, macOS and Linux distributions, the most readable first.
SYSTEM_FONTS = (
    "notosanscjk-regular.ttc", "notosanscjksc-regular.otf", "notosanssc-regular.otf",
    "notosanssc-regular.ttf", "sourcehansanssc-regular.otf", "sourcehansanscn-regular.otf", "msyh.ttc",
    "deng.ttf", "simhei.ttf", "hiragino sans gb.ttc", "stheiti medium.ttc", "wqy-microhei.ttc",
    "wqy-zenhei.ttc", "droidsansfallbackfull.ttf",
)  # fmt: skip
_NO_EMBEDDING, _NO_SUBSETS = 0x0002, 0x0100  # bits of OS/2.fsType


def has_cjk(text: str) -> bool:
    return any(ord(c) >= FIRST_CJK for c in text)


def small_font(text: str, flavor: str | None = None) -> bytes | None:
    """An OpenType font (or "woff") of the characters of `text` alone; None where no font has any of them.

    Of the fonts at hand the first that lacks the fewest characters. Shapes are those of mainland China.
    """
    wanted = {ord(c) for c in text if c.isprintable()}
    best, fewest = None, len(wanted)
    with contextlib.ExitStack() as opened:
        for path in _font_files():
            try:
                font = opened.enter_context(TTFont(path, fontNumber=0, lazy=True))
                lacking = len(wanted - font.getBestCmap().keys())
                embeddable = not font["OS/2"].fsType & (_NO_EMBEDDING | _NO_SUBSETS)
            except (OSError, TTLibError, KeyError, AttributeError):  # damaged, or without a Unicode map
                continue
            if embeddable and lacking < fewest:
                best, fewest = font, lacking
            if fewest == 0:
                break
        return _subset(best, wanted, flavor) if best else None


@contextlib.contextmanager
def figure_font(text: str) -> Iterator[list[str]]:
    """While open, matplotlib can draw `text` with the font families given."""
    data = small_font(text) if has_cjk(text) else None
    fallback = ["DejaVu Sans"]  # comes with matplotlib
    if data is None:
        yield fallback
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder, "report.otf")
        path.write_bytes(data)
        fonts = font_manager.fontManager
        fonts.addfont(path)
        try:
            yield [FAMILY, *fallback]
        finally:
            fonts.ttflist[:] = [entry for entry in fonts.ttflist if entry.fname != str(path)]


def _font_files() -> Iterator[Path]:
    found = {Path(name).name.lower(): Path(name) for name in font_manager.findSystemFonts()}
    yield from (found[name] for name in SYSTEM_FONTS if name in found)
    package = find_spec(
        "notojp_matplotlib"
    )  # only for its file: importing it would change matplotlib's settings
    if package and package.origin:
        yield from sorted(Path(package.origin).parent.glob("fonts/*.otf"))


def _subset(font: TTFont, wanted: set[int], flavor: str | None) -> bytes:
    _take_chinese_shapes(font, wanted)
    options = Options()
    options.layout_features, options.name_IDs, options.hinting = [], [1, 2], False
    options.notdef_outline = True
    options.drop_tables += ["BASE", "DSIG", "GDEF", "GPOS", "GSUB", "VORG", "vhea", "vmtx"]
    options.drop_tables += ["BDF", "FFTM"]  # WenQuanYi's; the subsetter would drop them with a warning
    subsetter = Subsetter(options)
    subsetter.populate(unicodes=wanted)
    subsetter.subset(font)
    for number, name in ((1, FAMILY), (2, "Regular"), (4, FAMILY), (6, FAMILY.replace(" ", ""))):
        font["name"].setName(
            name, number, 3, 1, 0x409
        )  # a name of its own: it must not be taken for the whole
    font.flavor = flavor
    data = io.BytesIO()
    font.save(data)
    return data.getvalue()


def _take_chinese_shapes(font: TTFont, wanted: set[int]) -> None:
    """Where a font of several countries would draw a character as in Japan (骨, 直), map it to the shape that
    its own "locl" feature has for simplified Chinese.
    """
    if "GSUB" not in font:
        return
    table = font["GSUB"].table
    features = {
        index
        for script in table.ScriptList.ScriptRecord
        for language in script.Script.LangSysRecord
        if language.LangSysTag == "ZHS "
        for index in language.LangSys.FeatureIndex
        if table.FeatureList.FeatureRecord[index].FeatureTag == "locl"
    }
    lookups = {
        i for index in features for i in table.FeatureList.FeatureRecord[index].Feature.LookupListIndex
    }
    shapes: dict[str, str] = {}
    for index in lookups:
        for subtable in table.LookupList.Lookup[index].SubTable:
            shapes |= getattr(getattr(subtable, "ExtSubTable", subtable), "mapping", {})
    for cmap in font["cmap"].tables:
        if cmap.isUnicode() and hasattr(cmap, "cmap"):
            cmap.cmap |= {c: shapes[cmap.cmap[c]] for c in wanted if cmap.cmap.get(c) in shapes}
