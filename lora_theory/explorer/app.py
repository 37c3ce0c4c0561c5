"""The explorer as a marimo notebook: `lora-theory explore`, or `marimo edit` to look inside."""

import marimo

app = marimo.App(width="full", app_title="lora_theory explorer", css_file="app.css")


@app.cell
def _():
    import html

    import marimo as mo

    from lora_theory.explorer.presets import PRESETS
    from lora_theory.explorer.session import Session

    return PRESETS, Session, html, mo


@app.cell
def _(Session, mo):
    # what the threads of the session find out: their setters run the cells below that read it
    get_point, set_point = mo.state(None)
    get_view, set_view = mo.state(None)
    get_words, set_words = mo.state("")
    address = mo.query_params()
    session = Session(
        address.to_dict(),
        show_point=set_point,
        show_view=set_view,
        show_words=set_words,
        thread=mo.Thread,
    )
    return address, get_point, get_view, get_words, session


@app.cell
def _(PRESETS, html, mo, session):
    presets = mo.ui.dropdown(
        list(PRESETS),
        label="Begin with",
        full_width=True,
        on_change=lambda name: session.choose(name) if name else None,
    )
    imported = mo.ui.file(
        filetypes=[".toml"],
        label="Import a problem (TOML)",
        on_change=lambda files: [session.import_toml(f.name, f.contents) for f in files],
    )
    title = mo.Html("<h1>lora_theory explorer</h1>")
    meanings = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(chosen.words)}</dd>"
        for name, chosen in PRESETS.items()
    )
    about = mo.Html(f"<details><summary>what these are</summary><dl>{meanings}</dl></details>")
    mo.sidebar([title, presets, about, imported, mo.ui.anywidget(session.panel)], width="24rem")
    return


@app.cell
def _(get_point, mo):
    mo.Html(get_point().to_html())
    return


@app.cell
def _(mo, session):
    mo.ui.anywidget(session.options)
    return


@app.cell
def _(get_words, html, mo):
    mo.Html(f'<p class="trial" role="status">{html.escape(get_words())}</p>')
    return


@app.cell
def _(get_view, mo):
    mo.Html(get_view().to_html())
    return


@app.cell
def _(mo, session):
    mo.hstack(
        [
            mo.download(session.pdf, filename="figure.pdf", label="Figure (PDF)"),
            mo.download(session.png, filename="figure.png", label="Figure (PNG)"),
            mo.download(session.csv, filename="table.csv", label="Table (CSV)"),
            mo.download(session.toml, filename="problem.toml", label="Problem (TOML)"),
        ],
        justify="start",
        wrap=True,
    )
    return


@app.cell
def _(address, get_point, get_view, mo, session):
    get_point(), get_view()
    for _name, _text in session.address().items():
        if address.get(_name) != _text:
            address[_name] = _text
    for _name in set(address.to_dict()) - set(session.address()):
        del address[_name]
    mo.Html(session.recipes())
    return


if __name__ == "__main__":
    app.run()
