"""Triton kernels and their launchers, one file per layer. Imported where triton is installed and wanted."""
