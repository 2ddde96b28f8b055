"""A color font with a few emoji, made without files."""

from __future__ import annotations

from pathlib import Path

# Glyph -> character. The font joins person and light tone to one glyph, and does not join thumb and tone.
CHARACTERS = {"person": 0x1F9D1, "thumb": 0x1F44D, "heart": 0x2764, "arrow": 0x2B05, "light": 0x1F3FB}
# The emoji that the font draws as one glyph.
DRAWN = {"🧑", "🧑🏻", "👍", "❤️", "⬅️"}
CELL = 1000


def make(path: Path, color: bool = True) -> Path:
    """Write a font in which each glyph is a red bar at the left of a square; that of the thumb has a black core.

    Args:
        path: file to write.
        color: whether the glyphs have colors.
    """
    from fontTools.colorLib.builder import buildCOLR, buildCPAL
    from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    names = [".notdef", *CHARACTERS, "person_light", "bar", "core"]
    shapes = {name: _rectangle(TTGlyphPen(None), CELL) for name in names}
    shapes["bar"] = _rectangle(TTGlyphPen(None), CELL // 4)
    shapes["core"] = _rectangle(TTGlyphPen(None), CELL // 5)
    shapes[".notdef"] = _rectangle(TTGlyphPen(None), CELL // 2)
    builder = FontBuilder(CELL, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({code: name for name, code in CHARACTERS.items()})
    builder.setupGlyf(shapes)
    builder.setupHorizontalMetrics({name: (CELL, 0) for name in names})
    builder.setupHorizontalHeader(ascent=CELL, descent=0)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    addOpenTypeFeaturesFromString(builder.font, "feature liga { sub person light by person_light; } liga;")
    if color:
        layers = {name: [("bar", 0)] for name in [*CHARACTERS, "person_light"]} | {"thumb": [("bar", 0), ("core", 1)]}
        builder.font["COLR"] = buildCOLR(layers, version=0)
        builder.font["CPAL"] = buildCPAL([[(1, 0, 0, 1), (0, 0, 0, 1)]])
    builder.save(path)
    return path


def _rectangle(pen, width: int):
    for number, corner in enumerate([(0, 0), (0, CELL), (width, CELL), (width, 0)]):
        (pen.lineTo if number else pen.moveTo)(corner)
    pen.closePath()
    return pen.glyph()
