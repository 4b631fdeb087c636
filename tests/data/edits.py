"""Changes of the rows of a file, for tests of bad input."""


def change(row, column, value):
    """A function that sets one cell of the rows that it gets."""

    def changed(rows):
        rows[row][column] = value
        return rows

    return changed
