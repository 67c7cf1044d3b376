"""Tables that fit any terminal without losing a name or a figure."""

from v2flow_cli.cli.text_table import text_table

HEADS = ("system", "bytes", "PSNR dB")
ROWS = [("a", "448", "21.74 ± 0.40"), ("日本", "1,024", "-")]


def test_one_table_where_it_fits():
    expected = """\
system  bytes       PSNR dB
---------------------------
a         448  21.74 ± 0.40
日本    1,024             -"""
    assert text_table(HEADS, ROWS, 27) == text_table(HEADS, ROWS, 0) == expected


def test_several_tables_with_the_names_if_it_does_not_fit():
    first, second = text_table(HEADS, ROWS, 26).split("\n\n")
    assert first.splitlines()[0].split() == ["system", "bytes"] and "21.74" not in first
    assert second.splitlines()[2] == "a       21.74 ± 0.40" and second.count("日本") == 1


def test_a_figure_wider_than_the_terminal_is_not_cut():
    assert "21.74 ± 0.40" in text_table(HEADS, ROWS, 5)
