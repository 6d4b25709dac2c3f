"""The books of the demo shop."""

from flask.testing import FlaskCliRunner
from sqlalchemy import Engine, text


def test_demo_stocks_the_shop_once(runner: FlaskCliRunner, engine: Engine) -> None:
    for _ in range(2):
        result = runner.invoke(args=["demo", "--users", "1"])
        assert result.exit_code == 0, result.output
        with engine.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM books")).scalar_one() == 12
