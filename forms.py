"""Fields and forms for several pages. Both databases can store each valid value."""

import re
import unicodedata
from threading import Lock
from typing import Any

import flask_security
from email_validator import SPECIAL_USE_DOMAIN_NAMES, validate_email
from flask import current_app, request
from flask_login import current_user
from flask_security.forms import EmailValidation, IsString, SendConfirmationForm
from flask_security.utils import get_message, password_length_validator
from flask_wtf import FlaskForm
from werkzeug.datastructures import MultiDict
from wtforms import EmailField, Field, Form, PasswordField, RadioField, SearchField, SelectChoice, StringField
from wtforms.validators import DataRequired, EqualTo, InputRequired, Length, Optional, ValidationError

from models import User, UserRepository, db

SPECIAL_USE_DOMAIN_NAMES.remove("localhost")  # the domain of the admin of `flask init-db`


def strip(text: str | None) -> str | None:
    return text.strip() if text else text


DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and symbols that show nothing
MOST_MARKS = 4  # on one letter: more than any language needs


def readable(_form: Form, field: Field) -> None:
    """Refuse text that is not one line, that shows nothing, or that hides its neighbours on a page.

    PostgreSQL also refuses NUL. A text that is too long is not checked further.
    """
    if field.errors or not field.data:
        return
    kinds = [unicodedata.category(character) for character in field.data]
    if {"Cc", "Zl", "Zp"}.intersection(kinds) or DIRECTIONS.intersection(field.data):
        raise ValidationError("Please leave out control characters.")
    if not any(kind[0] in "LNPS" for kind, each in zip(kinds, field.data, strict=True) if each not in BLANK):
        raise ValidationError("Please use characters that can be seen.")
    if "M" * (MOST_MARKS + 1) in "".join("M" if kind in ("Mn", "Me") else "-" for kind in kinds if kind != "Cf"):
        raise ValidationError(f"Please put at most {MOST_MARKS} accents on one letter.")


def normalized_email(email: str) -> str:
    """Return the normalized e-mail: NFC, a domain in ASCII, lower case. Raises ValueError if it is invalid.

    The forms, the rate limits and the commands compare e-mails in this form.
    """
    valid = validate_email(email.strip()[:500], check_deliverability=False, globally_deliverable=False)
    return f"{valid.local_part}@{valid.ascii_domain}".lower()


# zxcvbn tries each combination of the letters that symbols may stand for, which can take 8 s. So in a password with
# many such symbols, one character replaces all that stand for the same letter.
SUBSTITUTES = str.maketrans("{[<|!$+@", "(((11574")
MOST_SUBSTITUTES = 3


class Passwords(flask_security.PasswordUtil):
    _one_at_a_time = Lock()  # zxcvbn keeps the words in a variable of its module

    def validate(self, password: str, is_register: bool, **given: Any) -> tuple[list[str] | None, str]:
        """Return complaints about a new password, and its normalized form."""
        from zxcvbn import zxcvbn  # reads its lists of words

        normal = self.normalize(password)
        if too_long_or_short := password_length_validator(normal):
            return too_long_or_short, normal
        user = given.get("user")
        known = [user.email, user.name] if user else [str(given.get(name)) for name in ("email", "name")]
        known.append(current_app.config["APP_NAME"])
        words = {*known, known[0].partition("@")[0], *re.findall(r"\w{3,}", " ".join(known))}
        guessed = normal[:72]  # zxcvbn accepts no longer text
        if len(SUBSTITUTES.keys() & set(map(ord, guessed))) > MOST_SUBSTITUTES:
            guessed = guessed.translate(SUBSTITUTES)
        with self._one_at_a_time:
            score = zxcvbn(guessed, sorted(words))["score"]
        complaints = [get_message("PASSWORD_TOO_SIMPLE")[0]] if score < 3 else None
        return complaints, normal


class PostedForm(FlaskForm):
    """Reads only the fields of a browser's form. Flask-WTF would also read an uploaded file or JSON as text."""

    class Meta(FlaskForm.Meta):
        def wrap_formdata(self, form: Form, formdata: Any) -> Any:
            return formdata if isinstance(formdata, MultiDict) else request.form or None


def name_field() -> StringField:
    validators = IsString(), DataRequired(), Length(max=120), readable
    return StringField("Name", validators, filters=[strip], render_kw={"autocomplete": "name"})


class NameForm(PostedForm):
    name = name_field()


class SearchForm(FlaskForm):
    """A form that changes nothing, so browsers send it by GET, without a CSRF token."""

    class Meta:
        csrf = False

    q = SearchField(
        "Search",
        filters=[strip],
        validators=[Optional(), Length(max=100), readable],
        render_kw={"autocomplete": "off"},
    )


# ---- The forms of Flask-Security, with the fields' names and limits of this application

NOT_LONGER = Length(max=512, message="Please use 8 to 128 characters.")  # before the password is normalized and hashed


def password_field(label: str, autocomplete: str, *validators: Any, description: str = "") -> PasswordField:
    validators = IsString(), InputRequired(), NOT_LONGER, *validators
    return PasswordField(label, validators, description=description, render_kw={"autocomplete": autocomplete})


def new_password(label: str = "Password") -> PasswordField:
    return password_field(label, "new-password", description="At least 8 characters, and hard to guess.")


def repeated(field: str = "password", label: str = "Password again") -> PasswordField:
    return password_field(label, "new-password", EqualTo(field, "The two passwords differ."))


def email_field(autocomplete: str = "email", **strictness: bool) -> EmailField:
    validators = IsString(), InputRequired(), EmailValidation(**strictness)
    return EmailField("E-mail", validators, render_kw={"autocomplete": autocomplete})


class NextAnywhere:
    """A form that accepts any `next`. Flask-Security never redirects to another host."""

    def validate_next(self, field: Field) -> None:
        pass


class RegisterForm(NextAnywhere, flask_security.RegisterFormV2):
    """Does not check whether the e-mail has an account: `UserRepository.add` does the same work in both cases."""

    name = name_field()
    email = email_field(verify=True)
    password = new_password()
    password_confirm = repeated()


class LoginForm(NextAnywhere, flask_security.LoginForm):
    email = email_field("username")
    password = password_field("Password", "current-password")
    remember = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.next.data = self.next.data or "/"  # otherwise the redirect to the second factor names the host


class AskingForm:
    """A form that asks for a mail. If the e-mail has no account, the mail says so."""

    email = email_field()
    user: Any

    def validate(self, **options: Any) -> bool:
        if not flask_security.Form.validate(self, **options):
            return False
        self.user = UserRepository(db.session).by_email(self.email.data) or User(email=self.email.data)
        return True


class ForgotPasswordForm(AskingForm, flask_security.ForgotPasswordForm):
    pass


class ConfirmForm(AskingForm, SendConfirmationForm):
    pass


class ResetPasswordForm(flask_security.ResetPasswordForm):
    password = new_password()
    password_confirm = repeated()


class ChangePasswordForm(flask_security.ChangePasswordForm):
    password = password_field("Current password", "current-password")
    new_password = new_password("New password")
    new_password_confirm = repeated("new_password", "New password again")

    def validate(self, **options: Any) -> bool:
        is_valid: bool = super().validate(**options)
        if not is_valid and get_message("INVALID_PASSWORD")[0] in self.password.errors:
            current_user.track_failed_authn("password")  # as the other forms that check a password do
        return is_valid


class VerifyForm(NextAnywhere, flask_security.VerifyForm):
    password = password_field("Password", "current-password")


class TwoFactorForm(flask_security.TwoFactorSetupForm):
    setup = RadioField(choices=[SelectChoice(name) for name in ("authenticator", "disable")], validate_choice=False)


class CodeForm(flask_security.TwoFactorVerifyCodeForm):
    code = StringField(
        "Code",
        [IsString(), DataRequired(), Length(max=20)],
        render_kw={"autocomplete": "one-time-code", "inputmode": "numeric"},
    )


class RescueForm(flask_security.TwoFactorRescueForm):
    """A form without a choice: an operator helps, with `flask reset-password`."""

    help_setup = RadioField(choices=[])


ACCOUNT_FORMS: dict[str, Any] = {
    "register_form": RegisterForm,
    "login_form": LoginForm,
    "forgot_password_form": ForgotPasswordForm,
    "send_confirmation_form": ConfirmForm,
    "reset_password_form": ResetPasswordForm,
    "change_password_form": ChangePasswordForm,
    "verify_form": VerifyForm,
    "two_factor_setup_form": TwoFactorForm,
    "two_factor_verify_code_form": CodeForm,
    "two_factor_rescue_form": RescueForm,
}
