"""How the page looks: theme and style sheet, with fonts of the reader's own machine, so that a
browser asks no other host for anything.
"""

from gradio.themes import Base, colors, sizes

CSS = """
.gradio-container { max-width: 1360px !important; width: 100% !important;
  margin: 0 auto !important; }
.rm-title { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 12px; }
.rm-title h1 { font-size: 1.5rem; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
.rm-title span { color: var(--body-text-color-subdued); }
.rm-status { min-height: 1.5em; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.rm-error { color: #b91c1c; border-left: 3px solid currentColor;
  padding: 4px 10px; overflow-wrap: anywhere; }
.dark .rm-error { color: #fca5a5; }
.rm-message:not(:has(.rm-note)) { display: none; }

.rm-piece { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 16px;
  padding: 12px 0; border-top: 1px solid var(--border-color-primary); }
.rm-piece.rm-alone { grid-template-columns: minmax(0, 1fr); }
.rm-text, .rm-chunk { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.rm-text { font-size: 1rem; line-height: 1.6; }
.rm-prompt { color: var(--body-text-color-subdued); }
.rm-generated { color: var(--body-text-color); }
.rm-neighbors { display: flex; flex-direction: column; gap: 8px; }
.rm-caption { margin: 0; font-size: .8rem; color: var(--body-text-color-subdued); }
.rm-card { border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-secondary); padding: 8px 10px; font-size: .85rem; }
.rm-card header { display: flex; flex-wrap: wrap; gap: 2px 8px; align-items: baseline;
  margin-bottom: 4px; }
.rm-source { flex: 1 1 100%; overflow-wrap: anywhere; unicode-bidi: isolate; }
.rm-badge { border: 1px solid var(--border-color-primary); border-radius: 999px;
  padding: 0 8px; font-size: .75rem; }
.rm-score { font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued); }
.rm-chunk { line-height: 1.5; }
.rm-card mark { background: color-mix(in srgb, var(--color-accent) 28%, transparent);
  color: inherit; border-radius: 3px; padding: 1px 0; }

.rm-documents ul { list-style: none; margin: 6px 0 0; padding: 0; max-height: 15em;
  overflow-y: auto; }
.rm-documents li { display: flex; gap: 12px; justify-content: space-between; margin: 0;
  padding: 3px 6px 3px 0; border-top: 1px solid var(--border-color-primary); font-size: .9rem; }
.rm-documents li span:first-child { min-width: 0; overflow-wrap: anywhere;
  unicode-bidi: isolate; }
.rm-documents li span:last-child { white-space: nowrap; color: var(--body-text-color-subdued); }

@media (max-width: 640px) {
  .rm-piece { grid-template-columns: minmax(0, 1fr); gap: 8px; }
}
"""


def page_theme() -> Base:
    return Base(
        primary_hue=colors.teal,
        neutral_hue=colors.slate,
        text_size=sizes.text_md,
        radius_size=sizes.radius_md,
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    ).set(
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        button_cancel_background_fill=colors.red.c600,
        button_cancel_background_fill_hover=colors.red.c700,
        button_cancel_text_color="white",
    )
