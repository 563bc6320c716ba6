// A module of PTX as the machine executes it: every instruction of the forms that forms.cpp lists, decoded.
#pragma once

#include <climits>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base.h"

namespace ptx {

enum class Op : u8 {
  kMov,
  kPack,
  kUnpack,
  kAdd,
  kSub,
  kMul,
  kMulHi,
  kMulWide,
  kMad,
  kMadWide,
  kFma,
  kDiv,
  kRem,
  kMin,
  kMax,
  kAbs,
  kNeg,
  kCopysign,
  kNot,
  kAnd,
  kOr,
  kXor,
  kLop3,
  kShl,
  kShr,
  kShf,
  kBfe,
  kBfi,
  kPopc,
  kClz,
  kBrev,
  kPrmt,
  kSetp,
  kSelp,
  kCvt,
  kCvta,
  kEx2,
  kLg2,
  kRcp,
  kRsqrt,
  kSqrt,
  kLd,
  kSt,
  kAtom,
  kShfl,
  kRedux,
  kVote,
  kActivemask,
  kBarSync,
  kBarWarp,
  kBra,
  kBrx,
  kRet,
  kNop,
  kTrap,
  kCreatepolicy,
  kLdmatrix,
  kStmatrix,
  kMapa,
  kClusterArrive,
  kClusterWait,
  kMbarrierInit,
  kMbarrierExpect,
  kMbarrierTryWait,
  kBulkCopy,
};

enum class Space : u8 { kGeneric, kGlobal, kShared, kCluster, kParam };
enum class Compare : u8 { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
// What distinguishes instructions of one Op.
enum class Mode : u8 {
  kNone,
  kUp,
  kDown,
  kBfly,
  kIdx,
  kAdd,
  kMin,
  kMax,
  kAnd,
  kOr,
  kXor,
  kExch,
  kCas,
  kInc,
  kBallot,
  kAny,
  kAll,
  kUni,
  kLeft,
  kRight,
};

// An operand: a register, or as a complement a constant; kNoOperand is where nothing is given or "_".
constexpr int kNoOperand = INT_MIN;
constexpr int kMaxOperands = 9;

struct Instruction {
  Op op = Op::kNop;
  Type type = Type::kNone, from = Type::kNone;  // of the result and of the operands, where they differ
  u8 vector = 1;
  char round = 0;  // n, z, m or p: of a result; in capitals: to an integer
  Compare compare = Compare::kEq;
  Mode combine = Mode::kNone;  // a comparison with another predicate
  Mode mode = Mode::kNone;
  Space space = Space::kGeneric;
  bool flush = false, saturate = false, nan = false, approx = false, to = false, wrap = false;
  bool guard_negated = false, source_negated = false;
  int guard = -1;  // predicates
  int predicate = -1, other_predicate = -1, source = -1, other_source = -1;
  int num_results = 0, num_operands = 0;
  int results[8];
  int operands[kMaxOperands];
  int base = kNoOperand;  // of an address
  s64 offset = 0;
  int target = -1;  // of a jump, or the number of a table of jumps
  int file = 0, line = 0;
  std::string text;
};

struct Parameter {
  int offset, bytes;
};

struct Kernel {
  std::string name;
  std::map<std::string, Parameter> by_name;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0, num_registers = 0, num_predicates = 0;
  std::vector<Instruction> code;
  std::vector<u64> constants;  // each 32 times, a vector of lanes
  std::vector<std::vector<int>> tables;
  std::map<std::string, int> special;  // registers such as %tid.x, and where they are
};

struct Variable {
  u64 address;
  int bytes;
};

struct Program {
  std::map<std::string, Kernel> kernels;
  std::map<int, std::string> files;
  std::map<std::string, Variable> globals;
  std::map<std::string, u64> shared;  // offsets
  int shared_bytes = 0;               // of static shared memory, behind which dynamic memory begins
  std::string dynamic;                // its name
  std::vector<std::unique_ptr<char[]>> memory;
};

// Throws Error, with the name of what it does not know.
Program parse(const std::string& text);

// Forms of instructions: forms.cpp.
struct Form {
  Instruction prototype;
  const char* operands;
};
// Of an instruction with its modifiers, as in "add.rn.f32". The operands are given by a letter each, see forms.cpp.
std::vector<Form> forms_of(const std::string& name);

}  // namespace ptx
