"""A Django backend that hands a token for the broker to its page.

`TOKEN_SECRET=… PASSWORD=… python -m examples.tokens.django_app [--port 8006]`
"""

from __future__ import annotations

import argparse
import os
import secrets
import tempfile
import time
from pathlib import Path
from wsgiref.simple_server import make_server

import django
import jwt
from django.conf import settings
from django.contrib.auth.decorators import login_required
from django.core.management import call_command
from django.core.wsgi import get_wsgi_application
from django.http import FileResponse, HttpRequest, JsonResponse
from django.urls import path

PAGE = Path(__file__).with_name("page.html")
CLIENT = Path(__file__).parents[2] / "clients" / "js" / "wsbroker.js"


# These are the five lines.
@login_required
def token(request: HttpRequest) -> JsonResponse:
    """Make a token for whoever is logged in."""
    claims = {"sub": request.user.get_username(), "roles": ["user"], "exp": int(time.time()) + 900}
    return JsonResponse({"token": jwt.encode(claims, os.environ["TOKEN_SECRET"], "HS256")})


@login_required
def page(request: HttpRequest) -> FileResponse:
    """The page."""
    return FileResponse(PAGE.open("rb"), content_type="text/html")


def client(request: HttpRequest) -> FileResponse:
    """The client that the page uses."""
    return FileResponse(CLIENT.open("rb"), content_type="text/javascript")


LOGIN = """<form method="post">{% csrf_token %}{{ form }}<button>Log in</button></form>"""

urlpatterns = [path("", page), path("token", token), path("wsbroker.js", client)]


def configure(folder: Path) -> None:
    """Set Django up, with a database in a folder, and the one user alice."""
    settings.configure(
        SECRET_KEY=secrets.token_urlsafe(32),
        ALLOWED_HOSTS=["127.0.0.1", "localhost"],
        ROOT_URLCONF=__name__,
        LOGIN_URL="/login",
        LOGIN_REDIRECT_URL="/",
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": folder / "users.db"}},
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        USE_TZ=True,
        INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"],
        MIDDLEWARE=[
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.middleware.csrf.CsrfViewMiddleware",
            "django.contrib.auth.middleware.AuthenticationMiddleware",
        ],
        TEMPLATES=[
            {
                "BACKEND": "django.template.backends.django.DjangoTemplates",
                "OPTIONS": {"loaders": [("django.template.loaders.locmem.Loader", {"login.html": LOGIN})]},
            }
        ],
    )
    django.setup()
    call_command("migrate", verbosity=0)
    # Both can be imported only now.
    from django.contrib.auth.models import User
    from django.contrib.auth.views import LoginView

    urlpatterns.append(path("login", LoginView.as_view(template_name="login.html")))

    User.objects.create_user("alice", password=os.environ["PASSWORD"])


def main() -> None:
    """Serve on loopback, one request at a time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8006)
    with tempfile.TemporaryDirectory() as folder:
        configure(Path(folder))
        with make_server("127.0.0.1", parser.parse_args().port, get_wsgi_application()) as server:
            print(f"open http://127.0.0.1:{server.server_port}/", flush=True)
            server.serve_forever()


if __name__ == "__main__":
    main()
