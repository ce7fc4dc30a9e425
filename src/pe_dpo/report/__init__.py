"""What a run or a sweep showed: plots, tables and one self-contained page. Reads finished folders, loads no model."""
