// The forms of instructions that the machine knows, in full: an opcode with modifiers that matches none is refused.
//
// Operands, a letter each, "?" behind one that may be absent:
//   d result           D result, or a vector of them in braces     e result, and a predicate behind "|"
//   p predicate        q predicate, and its complement behind "|"  P predicate that is read, "!" negates it
//   s source           S source, or a vector of them               i integer constant that the form fixes to 0
//   a address          A address that is a source                  h hint for a cache, not read
//   L label            T table of labels                           _ nothing
#include <regex>
#include <set>

#include "program.h"

namespace ptx {
namespace {

#define INT "\\.(u16|u32|u64|s16|s32|s64)"
#define BITS "\\.(b16|b32|b64)"
#define ROUND "(\\.r[nzmp])?"
#define FTZ "(\\.ftz)?"
#define SAT "(\\.sat)?"
#define COMPARE "\\.(eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan)"
#define MEMORY "(\\.(weak|volatile|relaxed|acquire|release|acq_rel))?(\\.(cta|cluster|gpu|sys))?"
#define WHERE "(\\.(global|shared|shared::cta|shared::cluster))?"
#define CACHE "(\\.(ca|cg|cs|cv|lu|wb|wt))?(\\.L1::[a-z_]+)?(\\.L2::cache_hint)?(\\.L2::(64|128|256)B)?"
#define VECTOR "(\\.v[248])?"
#define ELEMENT "\\.(b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64)"

struct Pattern {
  Op op;
  const char* text;
  const char* operands;
};

const Pattern kPatterns[] = {
    // moves
    {Op::kMov, "mov\\.(b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64|b128)", "DS"},
    {Op::kMov, "mov\\.pred", "pP"},
    {Op::kSelp, "selp\\.(b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64)", "dssP"},
    {Op::kPrmt, "prmt\\.b32", "dsss"},
    {Op::kCvta, "cvta(\\.to)?\\.(global|shared|param)\\.u64", "ds"},
    {Op::kCvta, "cvta\\.to\\.shared::cluster\\.u64", "ds"},
    {Op::kMapa, "mapa\\.u64", "dss"},
    {Op::kMapa, "mapa\\.shared::cluster\\.u32", "dss"},
    // integers
    {Op::kAdd, "add" INT, "dss"},
    {Op::kSub, "sub" INT, "dss"},
    {Op::kMul, "mul\\.lo" INT, "dss"},
    {Op::kMulHi, "mul\\.hi" INT, "dss"},
    {Op::kMulWide, "mul\\.wide\\.(u16|u32|s16|s32)", "dss"},
    {Op::kMad, "mad\\.lo" INT, "dsss"},
    {Op::kMadWide, "mad\\.wide\\.(u16|u32|s16|s32)", "dsss"},
    {Op::kDiv, "div" INT, "dss"},
    {Op::kRem, "rem" INT, "dss"},
    {Op::kMin, "min" INT, "dss"},
    {Op::kMax, "max" INT, "dss"},
    {Op::kAbs, "abs\\.(s16|s32|s64)", "ds"},
    {Op::kNeg, "neg\\.(s16|s32|s64)", "ds"},
    {Op::kNot, "not" BITS, "ds"},
    {Op::kAnd, "and" BITS, "dss"},
    {Op::kOr, "or" BITS, "dss"},
    {Op::kXor, "xor" BITS, "dss"},
    {Op::kLop3, "lop3\\.b32", "dssss"},
    {Op::kShl, "shl" BITS, "dss"},
    {Op::kShr, "shr\\.(b16|b32|b64|u16|u32|u64|s16|s32|s64)", "dss"},
    {Op::kShf, "shf\\.[lr]\\.(wrap|clamp)\\.b32", "dsss"},
    {Op::kBfe, "bfe\\.(u32|u64|s32|s64)", "dsss"},
    {Op::kBfi, "bfi\\.(b32|b64)", "dssss"},
    {Op::kPopc, "popc\\.(b32|b64)", "ds"},
    {Op::kClz, "clz\\.(b32|b64)", "ds"},
    {Op::kBrev, "brev\\.(b32|b64)", "ds"},
    // predicates
    {Op::kNot, "not\\.pred", "pP"},
    {Op::kAnd, "and\\.pred", "pPP"},
    {Op::kOr, "or\\.pred", "pPP"},
    {Op::kXor, "xor\\.pred", "pPP"},
    {Op::kSetp, "setp" COMPARE FTZ "\\.(b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64)", "qss"},
    {Op::kSetp, "setp" COMPARE "\\.(and|or|xor)" FTZ "\\.(b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64)", "qssP"},
    {Op::kSetp, "setp" COMPARE "\\.(f16|bf16)", "qss"},
    {Op::kSetp, "setp" COMPARE "\\.(and|or|xor)\\.(f16|bf16)", "qssP"},
    // floats
    {Op::kAdd, "add" ROUND FTZ SAT "\\.f32", "dss"},
    {Op::kSub, "sub" ROUND FTZ SAT "\\.f32", "dss"},
    {Op::kMul, "mul" ROUND FTZ SAT "\\.f32", "dss"},
    {Op::kFma, "fma\\.r[nzmp]" FTZ SAT "\\.f32", "dsss"},
    {Op::kAdd, "add" ROUND "\\.f64", "dss"},
    {Op::kSub, "sub" ROUND "\\.f64", "dss"},
    {Op::kMul, "mul" ROUND "\\.f64", "dss"},
    {Op::kFma, "fma\\.r[nzmp]\\.f64", "dsss"},
    {Op::kAdd, "add" ROUND FTZ "\\.f32x2", "dss"},
    {Op::kSub, "sub" ROUND FTZ "\\.f32x2", "dss"},
    {Op::kMul, "mul" ROUND FTZ "\\.f32x2", "dss"},
    {Op::kFma, "fma\\.r[nzmp]" FTZ "\\.f32x2", "dsss"},
    {Op::kAdd, "add" ROUND SAT "\\.f32\\.(f16|bf16)", "dss"},
    {Op::kSub, "sub" ROUND SAT "\\.f32\\.(f16|bf16)", "dss"},
    {Op::kFma, "fma\\.r[nzmp]" SAT "\\.f32\\.(f16|bf16)", "dsss"},
    {Op::kDiv, "div\\.(approx|full)" FTZ "\\.f32", "dss"},
    {Op::kDiv, "div\\.r[nzmp]" FTZ "\\.f32", "dss"},
    {Op::kDiv, "div\\.r[nzmp]\\.f64", "dss"},
    {Op::kMin, "min" FTZ "(\\.NaN)?\\.f32", "dsss?"},
    {Op::kMax, "max" FTZ "(\\.NaN)?\\.f32", "dsss?"},
    {Op::kMin, "min\\.f64", "dss"},
    {Op::kMax, "max\\.f64", "dss"},
    {Op::kAbs, "abs" FTZ "\\.f32", "ds"},
    {Op::kNeg, "neg" FTZ "\\.f32", "ds"},
    {Op::kAbs, "abs\\.f64", "ds"},
    {Op::kNeg, "neg\\.f64", "ds"},
    {Op::kCopysign, "copysign\\.(f32|f64)", "dss"},
    {Op::kEx2, "ex2\\.approx" FTZ "\\.f32", "ds"},
    {Op::kLg2, "lg2\\.approx" FTZ "\\.f32", "ds"},
    {Op::kRcp, "rcp\\.(approx|rn|rz|rm|rp)" FTZ "\\.f32", "ds"},
    {Op::kRcp, "rcp\\.r[nzmp]\\.f64", "ds"},
    {Op::kSqrt, "sqrt\\.(approx|rn|rz|rm|rp)" FTZ "\\.f32", "ds"},
    {Op::kSqrt, "sqrt\\.r[nzmp]\\.f64", "ds"},
    {Op::kRsqrt, "rsqrt\\.approx" FTZ "\\.f32", "ds"},
    // conversions
    {Op::kCvt, "cvt" SAT "\\.[us](8|16|32|64)\\.[us](8|16|32|64)", "ds"},
    {Op::kCvt, "cvt\\.r[nzmp]i" FTZ SAT "\\.[us](8|16|32|64)\\.(f32|f64|f16|bf16)", "ds"},
    {Op::kCvt, "cvt\\.r[nzmp]" SAT "\\.(f32|f64|f16|bf16)\\.[us](8|16|32|64)", "ds"},
    {Op::kCvt, "cvt(\\.r[nzmp]i?)?" FTZ SAT "\\.(f32\\.f32|f64\\.f64)", "ds"},
    {Op::kCvt, "cvt" FTZ SAT "\\.(f32\\.(f16|bf16)|f64\\.(f32|f16|bf16))", "ds"},
    {Op::kCvt, "cvt\\.r[nzmp]" FTZ SAT "\\.f32\\.f64", "ds"},
    {Op::kCvt, "cvt\\.r[nz]\\.(f16|bf16)\\.(f32|f64)", "ds"},
    {Op::kCvt, "cvt\\.r[nz]\\.(f16x2|bf16x2)\\.f32", "dss"},
    // memory
    {Op::kLd, "ld\\.param" VECTOR ELEMENT, "Da"},
    {Op::kLd, "ldu?" MEMORY WHERE "(\\.nc)?" CACHE VECTOR ELEMENT, "Dah?"},
    {Op::kSt, "st" MEMORY WHERE CACHE VECTOR ELEMENT, "aSh?"},
    {Op::kAtom,
     "atom" MEMORY WHERE
     "\\.(add\\.(u32|s32|u64|f32|f64)|(min|max)\\.(u32|s32|u64|s64)|(and|or|xor|exch)\\.(b32|b64)|inc\\.u32)",
     "das"},
    {Op::kAtom, "atom" MEMORY WHERE "\\.cas\\.(b32|b64)", "dass"},
    {Op::kAtom,
     "red" MEMORY WHERE "\\.(add\\.(u32|s32|u64|f32|f64)|(min|max)\\.(u32|s32|u64|s64)|(and|or|xor)\\.(b32|b64))",
     "as"},
    {Op::kCreatepolicy, "createpolicy\\.fractional\\.L2::[a-z_]+\\.b64", "ds?"},
    {Op::kLdmatrix, "ldmatrix\\.sync\\.aligned\\.m8n8\\.x[124]\\.shared(::cta)?\\.b16", "Da"},
    {Op::kStmatrix, "stmatrix\\.sync\\.aligned\\.m8n8\\.x[124]\\.shared(::cta)?\\.b16", "aS"},
    {Op::kNop, "(membar\\.(cta|gl|sys)|fence(\\.[a-z_:]+)+)", ""},
    // warps
    {Op::kShfl, "shfl\\.sync\\.(up|down|bfly|idx)\\.b32", "essss"},
    {Op::kRedux, "redux\\.sync\\.(add|min|max)\\.(u32|s32)", "dss"},
    {Op::kRedux, "redux\\.sync\\.(and|or|xor)\\.b32", "dss"},
    {Op::kRedux, "redux\\.sync\\.(min|max)(\\.NaN)?\\.f32", "dss"},
    {Op::kVote, "vote\\.sync\\.ballot\\.b32", "dPs"},
    {Op::kVote, "vote\\.sync\\.(any|all|uni)\\.pred", "pPs"},
    {Op::kActivemask, "activemask\\.b32", "d"},
    {Op::kBarWarp, "bar\\.warp\\.sync", "s"},
    // blocks and clusters
    {Op::kBarSync, "(bar|barrier)(\\.cta)?\\.sync(\\.aligned)?", "i"},
    {Op::kClusterArrive, "barrier\\.cluster\\.arrive(\\.(release|relaxed))?(\\.aligned)?", ""},
    {Op::kClusterWait, "barrier\\.cluster\\.wait(\\.acquire)?(\\.aligned)?", ""},
    {Op::kMbarrierInit, "mbarrier\\.init\\.shared(::cta)?\\.b64", "as"},
    {Op::kMbarrierExpect, "mbarrier\\.arrive\\.expect_tx\\.shared(::cta)?\\.b64", "_as"},
    {Op::kMbarrierTryWait, "mbarrier\\.(try|test)_wait\\.parity\\.shared(::cta)?\\.b64", "pas"},
    {Op::kBulkCopy, "cp\\.async\\.bulk\\.shared::cluster\\.global\\.mbarrier::complete_tx::bytes", "AAsA"},
    // control
    {Op::kBra, "bra(\\.uni)?", "L"},
    {Op::kBrx, "brx\\.idx(\\.uni)?", "sT"},
    {Op::kRet, "(ret(\\.uni)?|exit)", ""},
    {Op::kTrap, "trap", ""},
    {Op::kNop, "(nanosleep\\.u32)", "s"},
};

const std::map<std::string, Compare> kComparisons = {
    {"eq", Compare::kEq},   {"ne", Compare::kNe},   {"lt", Compare::kLt},   {"le", Compare::kLe},
    {"gt", Compare::kGt},   {"ge", Compare::kGe},   {"lo", Compare::kLt},   {"ls", Compare::kLe},
    {"hi", Compare::kGt},   {"hs", Compare::kGe},   {"equ", Compare::kEqu}, {"neu", Compare::kNeu},
    {"ltu", Compare::kLtu}, {"leu", Compare::kLeu}, {"gtu", Compare::kGtu}, {"geu", Compare::kGeu},
    {"num", Compare::kNum}, {"nan", Compare::kNan},
};
const std::map<std::string, Mode> kModes = {
    {"up", Mode::kUp},     {"down", Mode::kDown},     {"bfly", Mode::kBfly}, {"idx", Mode::kIdx}, {"add", Mode::kAdd},
    {"min", Mode::kMin},   {"max", Mode::kMax},       {"and", Mode::kAnd},   {"or", Mode::kOr},   {"xor", Mode::kXor},
    {"exch", Mode::kExch}, {"cas", Mode::kCas},       {"inc", Mode::kInc},   {"any", Mode::kAny}, {"all", Mode::kAll},
    {"uni", Mode::kUni},   {"ballot", Mode::kBallot}, {"l", Mode::kLeft},    {"r", Mode::kRight},
};

Instruction prototype(Op op, const std::string& name) {
  Instruction i;
  i.op = op;
  size_t at = name.find('.');
  while (at != std::string::npos) {
    const size_t next = name.find('.', at + 1);
    const std::string m = name.substr(at + 1, next == std::string::npos ? next : next - at - 1);
    at = next;
    if (const Type type = type_named(m); type != Type::kNone) {
      if (i.type == Type::kNone) i.type = type;
      i.from = type;
    } else if (op == Op::kSetp && kComparisons.count(m)) {
      i.compare = kComparisons.at(m);
    } else if (op == Op::kSetp && kModes.count(m)) {
      i.combine = kModes.at(m);
    } else if (kModes.count(m) && op != Op::kBra && op != Op::kRet && op != Op::kBrx) {
      i.mode = kModes.at(m);
    } else if (m == "ftz") {
      i.flush = true;
    } else if (m == "sat") {
      i.saturate = true;
    } else if (m == "NaN") {
      i.nan = true;
    } else if (m == "approx" || m == "full") {
      i.approx = true;
    } else if (m == "to") {
      i.to = true;
    } else if (m == "wrap") {
      i.wrap = true;
    } else if (m.size() == 2 && m[0] == 'r') {
      i.round = m[1];
    } else if (m.size() == 3 && m[0] == 'r' && m[2] == 'i') {
      i.round = (char)toupper(m[1]);
    } else if (m == "v2" || m == "v4" || m == "v8") {
      i.vector = (u8)(m[1] - '0');
    } else if (m == "global") {
      i.space = Space::kGlobal;
    } else if (m == "shared" || m == "shared::cta") {
      i.space = Space::kShared;
    } else if (m == "shared::cluster") {
      i.space = Space::kCluster;
    } else if (m == "param") {
      i.space = Space::kParam;
    }
  }
  return i;
}

}  // namespace

std::vector<Form> forms_of(const std::string& name) {
  static const std::vector<std::regex> compiled = [] {
    std::vector<std::regex> all;
    for (const Pattern& p : kPatterns) all.emplace_back(p.text);
    return all;
  }();
  static std::map<std::string, std::vector<Form>> known;
  const auto [entry, is_new] = known.try_emplace(name);
  if (is_new)
    for (size_t i = 0; i < compiled.size(); ++i)
      if (std::regex_match(name, compiled[i]))
        entry->second.push_back({prototype(kPatterns[i].op, name), kPatterns[i].operands});
  return entry->second;
}

}  // namespace ptx
