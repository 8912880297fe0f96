"""One file for every question that the report answers; importing the report registers all of them.

A topic holds everything about its rows, in this order: the figures (``chart_*``, registered with
:func:`~lightning_goldy.report.figures.register_figure`), what they draw (functions that take a row, check it, raise
:class:`~lightning_goldy.report.figures.ReportError` with the path of what is wrong, and give numbers), the captions
(``*_caption``), tables for the page (``*_html``), and at the end the words around it (``describe``).

A figure is built with :mod:`~lightning_goldy.report.builders`: numbers and a frozen style. Where no helper fits, write
an Altair chart over ``altair.NamedData``, in a function under ``functools.lru_cache``, and give the numbers to
:class:`~lightning_goldy.report.figures.Figure` by name: so the page stores the chart once for all steps. Labels are
data, never field names. Colours that must compare over steps or panels get ``bounds(name)`` as domain and their extent
through ``ranges``.
"""
