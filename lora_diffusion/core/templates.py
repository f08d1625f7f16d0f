"""Rendering of the jinja2 templates that a package keeps in its folder `templates`."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def render_template(package: str, template: str, /, **values: object) -> str:
    """Render a template.

    Args:
        package: Dotted name of the package whose folder `templates` holds the template.
        template: File name. Values are escaped in templates that end in `.html.j2`.
        **values: The variables of the template. A variable that the template uses and that is missing is an error.
    """
    return _template_environment(package).get_template(template).render(**values)


@cache
def _template_environment(package: str) -> Environment:
    return Environment(
        loader=PackageLoader(package),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
