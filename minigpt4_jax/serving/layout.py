"""The page: what lies where, and which handler of the desk each part calls."""

from pathlib import Path

import gradio as gr

from minigpt4_jax.generator import Generator
from minigpt4_jax.request import Sampling
from minigpt4_jax.serving.desk import Desk
from minigpt4_jax.serving.photos import Example
from minigpt4_jax.serving.turns import Conversation

ASSETS = Path(__file__).parent.parent / "assets"
CSS = ASSETS / "web.css"
TITLE = "MiniGPT-4 in JAX"
WARNING = "Answers can be wrong. Nobody should have to rely on them."
MOST_BEAMS = 10  # as in the reference's demo
FREE = dict(api_visibility="private", show_progress="hidden")

# Gradio reads ?__theme= once; the class is what it sets.
SWITCH_THEME = "() => { document.body.classList.toggle('dark'); }"

THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    radius_size="lg",
    # Fonts of the machine: the page asks no other host for any.
    font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"),
    font_mono=("ui-monospace", "Consolas", "monospace"),
)


def page(desk: Desk, *, card: str, concurrency: int, max_tokens: int) -> gr.Blocks:
    """The page of one model.

    Args:
        card: Markdown about the model and its limits.
        concurrency: answers that are streamed at once; more people wait in a line.
        max_tokens: of an answer, as far as the slider goes.
    """
    samples = desk.samples
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, 86400)
    ) as made:
        state = gr.State(Conversation(), time_to_live=24 * 3600)
        with gr.Row(elem_id="top"):
            gr.HTML(f"<h1>{TITLE}</h1><p>Show a photo, then talk about it.</p>")
            theme = gr.Button("Dark or light", size="sm", elem_id="theme", min_width=90)
        with gr.Row(elem_id="desk"):
            with gr.Column(elem_id="see"):
                photo, gallery, credit = _photo(samples)
                look = gr.Button(
                    "Where does it look?",
                    size="sm",
                    visible=desk.gaze is not None,
                    elem_id="look",
                )
                seen = gr.Image(
                    label="Bright where the queries look",
                    interactive=False,
                    visible=False,
                    buttons=["fullscreen"],
                    elem_id="seen",
                )
            with gr.Column(elem_id="talk"):
                chat, box, reset = _talk()
            with gr.Column(elem_id="more"):
                knobs = _knobs(max_tokens)
                with gr.Accordion("The model and its limits", open=False):
                    gr.Markdown(card)
                with gr.Accordion("Whose photos the examples are", open=False):
                    gr.Markdown(
                        "\n".join(f"- {e.name}: {e.credit}" for e in samples)
                        + "\n\nAll resized. Terms: creativecommons.org/licenses/by/2.0 "
                        "and creativecommons.org/publicdomain/zero/1.0"
                    )

        shown = [chat, box, state]
        streamed = dict(
            outputs=shown,
            concurrency_limit=concurrency,
            concurrency_id="answers",
            show_progress="hidden",
        )
        asked = [state, box, photo, *knobs]
        made.load(Conversation, None, state, **FREE)
        box.submit(desk.ask, asked, api_name="ask", **streamed)
        box.stop(desk.stop, queue=False, **FREE)
        hidden = dict(streamed, api_visibility="private")
        chat.retry(desk.retry, [state, *knobs], **hidden)
        chat.edit(desk.edit, [state, *knobs], **hidden)
        chat.undo(desk.undo, state, shown, **FREE)
        for event in (chat.clear, reset.click):
            event(desk.reset, state, shown, queue=False, **FREE)
        look.click(
            desk.look,
            photo,
            [seen, seen],
            concurrency_limit=2,
            api_visibility="private",
        )
        hide = dict(queue=False, **FREE)
        photo.change(lambda: gr.update(visible=False), None, seen, **hide)
        photo.input(lambda: "", None, credit, **hide)
        gallery.select(desk.example, state, [photo, credit, *shown], **hide).success(
            desk.ask, asked, **hidden
        )
        theme.click(None, js=SWITCH_THEME, api_visibility="private")
        made.unload(desk.stop)
    made.queue(max_size=4 * concurrency, api_open=False)
    return made


def _photo(samples: list[Example]) -> tuple[gr.Image, gr.Gallery, gr.Markdown]:
    photo = gr.Image(
        label="Photo",
        sources=["upload", "webcam", "clipboard"],
        image_mode=None,
        height=260,
        buttons=[],
        placeholder="Drop a photo here,\npaste one, or click",
        elem_id="photo",
        alt_text="The photo to talk about",
        type="filepath",
    )
    # The file as it came: gr.Image would decode it first, with limits and errors that are
    # not ours. Not in a subclass, beside which Gradio would write a .pyi.
    photo.preprocess = lambda payload: payload.path if payload else None
    credit = gr.Markdown(elem_id="credit")
    gr.HTML("<p>Or one of these, with a question:</p>", elem_id="or")
    gallery = gr.Gallery(
        [(e.path, e.name) for e in samples],
        show_label=False,
        columns=3,
        rows=2,
        height="auto",
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="examples",
    )
    return photo, gallery, credit


def _talk() -> tuple[gr.Chatbot, gr.Textbox, gr.Button]:
    chat = gr.Chatbot(
        show_label=False,
        height="100%",
        editable="user",
        buttons=["copy"],
        # Plain text: a model's or a person's Markdown could show pictures of other hosts.
        render_markdown=False,
        feedback_options=None,
        latex_delimiters=[],
        allow_file_downloads=False,
        layout="bubble",
        placeholder="Show a photo and ask something about it,\nor take an example.",
        elem_id="chat",
    )
    with gr.Row(elem_id="ask"):
        box = gr.Textbox(
            placeholder="Ask about the photo",
            show_label=False,
            container=False,
            lines=1,
            max_lines=6,
            submit_btn=True,
            stop_btn=False,
            autofocus=True,
            scale=6,
            elem_id="box",
        )
        reset = gr.Button("New chat", size="sm", scale=1, min_width=90, elem_id="reset")
    gr.HTML(f"<p>{WARNING}</p>", elem_id="warning")
    return chat, box, reset


def _knobs(max_tokens: int) -> list[gr.components.Component]:
    """The reference's two sliders, and the rest in a fold; with the reference's values."""
    usual = Sampling()
    beams = gr.Slider(
        *(1, MOST_BEAMS),
        value=1,
        step=1,
        label="Beams",
        info="Above 1: a search, whose answer comes at once.",
    )
    temperature = gr.Slider(
        *(0.1, 2.0),
        value=usual.temperature,
        step=0.1,
        label="Temperature",
        info="Low: the likeliest words. High: rarer ones.",
    )
    with gr.Accordion("More settings", open=False):
        tokens = gr.Slider(
            *(1, max_tokens),
            value=min(usual.max_tokens, max_tokens),
            step=1,
            label="Most tokens of an answer",
        )
        top_p = gr.Slider(0.05, 1.0, value=usual.top_p, step=0.05, label="Top-p")
        penalty = gr.Slider(
            *(1.0, 2.0),
            value=usual.repetition_penalty,
            step=0.05,
            label="Repetition penalty",
        )
        seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed")
    return [beams, temperature, tokens, top_p, penalty, seed]


def card_of(generator: Generator, checkpoint: str) -> str:
    """About the model: the demo's card where it is the demo, else what it is made of."""
    cfg = generator.model.cfg
    if checkpoint == "demo":
        return (ASSETS / "demo/README.md").read_text()
    queries = "strips of patches" if cfg.qformer is None else "a Q-Former"
    return (
        f"**{cfg.name}**: a ViT of {cfg.vit.num_layers} layers, {queries}, "
        f"{cfg.num_slots} image embeddings, a decoder of {cfg.llama.num_layers} layers "
        f"that reads {cfg.llama.max_positions:,} tokens.\n\n{WARNING}"
    )
