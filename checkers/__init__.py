"""Is it right? The checks that rewards.py needs.

answers, expressions, spelling      math: what an answer says, what it is worth, how it is spelt
shapes                              math: is an answer copied from the question?
sandbox, judge, confine, wire       programs: run against their tests, and kept from doing harm
"""
