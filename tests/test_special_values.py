"""The README's table of special values, row by row, on every instruction set; and the floating-point state."""
