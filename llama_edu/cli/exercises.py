"""`llama-edu exercises`: what there is to solve, and what you have solved."""

from __future__ import annotations

from itertools import groupby

from llama_edu.errors import UserError


def exercises(lesson: str | None = None, *, reset: bool = False) -> int:
    """Show your progress through the exercises of the lessons.

    Args:
        lesson: the first characters of a lesson's name, such as 21 or 4; all lessons when left out.
        reset: forget what was solved.
    """
    from llama_edu.exercises import LEVELS, all_exercises, progress_file, solved

    found = [e for e in all_exercises() if lesson is None or e.lesson.startswith(lesson)]
    if not found:
        lessons = sorted({e.lesson for e in all_exercises()})
        raise UserError(f"no lesson begins with {lesson!r}; those with exercises are {', '.join(lessons)}")
    if reset:
        progress_file().unlink(missing_ok=True)
    done = solved()
    for name, group in groupby(found, key=lambda e: e.lesson):
        of_lesson = list(group)
        print(f"{name}  {sum((e.lesson, e.name) in done for e in of_lesson)} of {len(of_lesson)}")
        for e in of_lesson:
            mark = "x" if (e.lesson, e.name) in done else " "
            print(f"  [{mark}] {e.name:32} {LEVELS[e.level]:7} {e.minutes:3} minutes")
    count = sum((e.lesson, e.name) in done for e in found)
    left = sum(e.minutes for e in found if (e.lesson, e.name) not in done)
    print(f"solved: {count} of {len(found)}; the others take about {left} minutes")
    return 0
